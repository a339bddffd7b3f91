// The one way to start a kernel.
#pragma once
#include <tuple>
#include <utility>

#include "platform/device.h"

namespace kda {

#if defined(KDA_EMULATE)

/// Runs the grid on the CPU before it returns; throws emulator::Error where the kernel misuses the machine.
template <class... P, class... A>
void launch(char const* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            A&&... arguments) {
  std::tuple<std::decay_t<P>...> by_value(std::forward<A>(arguments)...);
  emulator::run_grid(name, grid, block, shared_bytes, [&] { std::apply(kernel, by_value); });
}

#else

/// Launches on `stream`; throws std::runtime_error with the kernel's name.
template <class... P, class... A>
void launch(char const* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... arguments) {
  void const* const function = reinterpret_cast<void const*>(kernel);
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  std::tuple<std::decay_t<P>...> by_value(std::forward<A>(arguments)...);
  std::apply(
      [&](auto&... x) {
        void* pointers[] = {&x...};
        check_cuda(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream), name);
      },
      by_value);
}

#endif

}  // namespace kda
