// The launches for one element type; included by the files in variants/ alone.
#pragma once
#include "kda/gated_rmsnorm/wide_kernel.h"
#include "kda/gated_rmsnorm/launch.h"

namespace kda {

/// For rows that a few lanes hold.
template <class Shape>
struct GatedRmsNormKernels {
  using K = Kernel<GatedRmsNormParams>;
  static K fwd() { return {{"gated_rmsnorm_fwd", &typeid(Shape), kNormThreads, 0}, gated_rmsnorm_fwd_kernel<Shape>}; }
  static K bwd() { return {{"gated_rmsnorm_bwd", &typeid(Shape), kNormThreads, 0}, gated_rmsnorm_bwd_kernel<Shape>}; }
};
/// For any rows.
template <class E>
struct WideNormKernels {
  using K = Kernel<GatedRmsNormParams>;
  static K fwd() { return {{"gated_rmsnorm_fwd_wide", &typeid(E), kNormThreads, 0}, gated_rmsnorm_fwd_wide_kernel<E>}; }
  static K bwd() { return {{"gated_rmsnorm_bwd_wide", &typeid(E), kNormThreads, 0}, gated_rmsnorm_bwd_wide_kernel<E>}; }
  static K reduce() {
    return {{"gated_rmsnorm_reduce", &typeid(void), kNormSumThreads, 0}, gated_rmsnorm_reduce_kernel};
  }
};
template <class E>
std::vector<KernelLaunch> gated_rmsnorm_kernels() {
  using Wide = WideNormKernels<E>;
  std::vector<KernelLaunch> all{Wide::fwd(), Wide::bwd(), Wide::reduce()};
  auto const add = [&](auto shape) {
    using Kernels = GatedRmsNormKernels<decltype(shape)>;
    all.push_back(Kernels::fwd()), all.push_back(Kernels::bwd());
  };
  add(NormShape<E, 8>{}), add(NormShape<E, 16>{}), add(NormShape<E, 32>{});
  return all;
}

/// Calls f(Shape{}) with the fewest lanes that hold a row; returns whether any do.
template <class E, class F>
bool with_norm_shape(GatedRmsNormParams const& p, F f) {
  if (!p.in_pieces || p.dim > kNormMaxPieceDim) return false;
  if (p.dim <= 8 * kNormElements) f(NormShape<E, 8>{});
  else if (p.dim <= 16 * kNormElements) f(NormShape<E, 16>{});
  else f(NormShape<E, 32>{});
  return true;
}
inline dim3 blocks_for(int64_t count, int per_block) { return dim3(unsigned((count + per_block - 1) / per_block)); }

template <class E>
void launch_gated_rmsnorm_fwd(GatedRmsNormParams const& p, cudaStream_t stream) {
  int64_t const rows = p.outer * p.heads;
  bool const in_pieces = with_norm_shape<E>(p, [&](auto shape) {
    using Shape = decltype(shape);
    launch(GatedRmsNormKernels<Shape>::fwd(), blocks_for(rows, Shape::kRowsPerBlock), stream, p);
  });
  if (!in_pieces) launch(WideNormKernels<E>::fwd(), blocks_for(rows, kNormWarps), stream, p);
}

template <class E>
void launch_gated_rmsnorm_bwd(GatedRmsNormParams const& p, cudaStream_t stream) {
  bool const in_pieces = with_norm_shape<E>(
      p, [&](auto shape) { launch(GatedRmsNormKernels<decltype(shape)>::bwd(), dim3(unsigned(p.runs)), stream, p); });
  if (!in_pieces) launch(WideNormKernels<E>::bwd(), blocks_for(p.runs, kNormWarps), stream, p);
  launch_early(true, WideNormKernels<E>::reduce(), dim3(column_sum_blocks(p.dim, kNormSumColumns)), stream, p);
}

template <class E>
GatedRmsNormVariant describe_gated_rmsnorm() {
  return {dtype_of<E>(), &gated_rmsnorm_kernels<E>, &launch_gated_rmsnorm_fwd<E>, &launch_gated_rmsnorm_bwd<E>};
}

}  // namespace kda
