// The launches for one element type of g; included by the files in variants/ alone.
#pragma once
#include "kda/kda_gate/kernel.h"
#include "kda/kda_gate/launch.h"

namespace kda {

template <class E>
struct KdaGateKernels {
  using K = Kernel<KdaGateParams>;
  static K fwd() { return {{"kda_gate_fwd", &typeid(E), kGateThreads, 0}, kda_gate_fwd_kernel<E>}; }
  static K bwd() { return {{"kda_gate_bwd", &typeid(E), kGateThreads, 0}, kda_gate_bwd_kernel<E>}; }
  static K reduce() { return {{"kda_gate_reduce", &typeid(void), kGateThreads, 0}, kda_gate_reduce_kernel}; }
};
template <class E>
std::vector<KernelLaunch> kda_gate_kernels() {
  using Kernels = KdaGateKernels<E>;
  return {Kernels::fwd(), Kernels::bwd(), Kernels::reduce()};
}

template <class E>
void launch_kda_gate_fwd(KdaGateParams const& p, cudaStream_t stream) {
  int64_t const rows = p.rows0 * p.rows1, runs = (rows + 15) / 16;
  launch(KdaGateKernels<E>::fwd(), dim3(unsigned(runs < 4096 ? runs : 4096), unsigned(p.value_heads)), stream, p);
}

template <class E>
void launch_kda_gate_bwd(KdaGateParams const& p, cudaStream_t stream) {
  launch(KdaGateKernels<E>::bwd(), dim3(unsigned(p.row_blocks), unsigned(p.value_heads)), stream, p);
  launch(KdaGateKernels<E>::reduce(), dim3(unsigned(p.value_heads)), stream, p);
}

template <class E>
KdaGateVariant describe_kda_gate() {
  return {dtype_of<E>(), &kda_gate_kernels<E>, &launch_kda_gate_fwd<E>, &launch_kda_gate_bwd<E>};
}

}  // namespace kda
