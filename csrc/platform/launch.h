// The one way to start a kernel.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "platform/macros.h"

namespace kda {

#if defined(KDA_EMULATE)

/// Runs the grid on the CPU before it returns; throws emulator::Error where the kernel misuses the machine.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            A&&... arguments) {
  std::tuple<std::decay_t<P>...> by_value(std::forward<A>(arguments)...);
  emulator::run_grid(name, grid, block, shared_bytes, [&] { std::apply(kernel, by_value); });
}

/// Shared memory that a block may have, in bytes.
inline size_t shared_memory_limit() { return emulator::options().shared_limit; }

#else

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("kda_cuda: ") + what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

/// Launches on `stream`; throws std::runtime_error with the kernel's name.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... arguments) {
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes)),
               name);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(std::forward<A>(arguments))...);
  check_cuda(cudaGetLastError(), name);
}

/// Shared memory that a block of the current device may have, in bytes.
inline size_t shared_memory_limit() {
  static int limit[64] = {};
  const int device = current_device();
  int& known = limit[device & 63];
  if (!known) check_cuda(cudaDeviceGetAttribute(&known, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device query");
  return size_t(known);
}

#endif

}  // namespace kda
