// The one way to start a kernel.
#pragma once
#include <tuple>
#include <typeinfo>
#include <utility>

#include "platform/device.h"

namespace kda {

/// How a kernel is launched, whatever the grid.
struct KernelLaunch {
  char const* name;                // of the kernel, without "_kernel"
  std::type_info const* argument;  // of its template; of void: there is none
  int threads;
  size_t shared_bytes;  // dynamic
  int cluster = 1;      // neighbouring blocks in x that run at the same time, so that they may wait for each other
};
template <class... P>
struct Kernel : KernelLaunch {
  void (*function)(P...);
};

#if defined(KDA_EMULATE)

/// Runs the grid on the CPU; throws emulator::Error where a kernel misuses the machine.
template <class... P, class... A>
void launch_with(bool early, int, char const* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                 cudaStream_t, A&&... arguments) {
  std::tuple<std::decay_t<P>...> by_value(std::forward<A>(arguments)...);
  emulator::run_grid(name, early && overlaps_kernels(), grid, block, shared_bytes,
                     [kernel, by_value = std::move(by_value)] { std::apply(kernel, by_value); });
}
using OverlapScope = emulator::OverlapScope;

#else

template <class... P, class... A>
void launch_with(bool early, int cluster, char const* name, void (*kernel)(P...), dim3 grid, dim3 block,
                 size_t shared_bytes, cudaStream_t stream, A&&... arguments) {
  void const* const function = reinterpret_cast<void const*>(kernel);
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attributes;
  if (early && overlaps_kernels()) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  std::tuple<std::decay_t<P>...> by_value(std::forward<A>(arguments)...);
  std::apply(
      [&](auto&... x) {
        void* pointers[] = {&x...};
        check_cuda(cudaLaunchKernelExC(&config, function, pointers), name);
      },
      by_value);
}

/// On the emulator launches are complete when they return, except within an OverlapScope: there kernels that are
/// launched early run beside others, and all are complete when it ends.
struct OverlapScope {
  OverlapScope() {}
};

#endif

/// Launches on `stream`; throws std::runtime_error with the kernel's name.
template <class Function, class... X>
void launch(char const* name, Function kernel, X&&... x) {
  launch_with(false, 1, name, kernel, std::forward<X>(x)...);
}

/// The same, but where `early` the kernel may start before the one ahead of it in the stream has ended, once that one
/// lets it (barriers.h, let_next_kernel_start): it has to call wait_for_previous_kernel before it touches what the
/// other writes or reads. Some thread of it has to call that in any case, or else what is behind it would not wait for
/// the one ahead. Before compute capability 9.0 an ordinary launch.
template <class Function, class... X>
void launch_early(bool early, char const* name, Function kernel, X&&... x) {
  launch_with(early, 1, name, kernel, std::forward<X>(x)...);
}

template <class... P, class... A>
void launch_early(bool early, Kernel<P...> const& kernel, dim3 grid, cudaStream_t stream, A const&... a) {
  launch_with(early, kernel.cluster, kernel.name, kernel.function, grid, dim3(unsigned(kernel.threads)),
              kernel.shared_bytes, stream, a...);
}
template <class... P, class... A>
void launch(Kernel<P...> const& kernel, dim3 grid, cudaStream_t stream, A const&... a) {
  launch_early(false, kernel, grid, stream, a...);
}

}  // namespace kda
