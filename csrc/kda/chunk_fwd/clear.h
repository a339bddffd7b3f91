// What is set to zero before the work: counters of the workspace, and the output for tokens that no sequence computes:
// those of sequences with a null slot, and those outside of cu_seqlens, as a captured graph has them when it is
// replayed with fewer tokens.
#pragma once
#include "kda/chunk_fwd/params.h"

namespace kda {

inline constexpr int kClearBlocks = 8, kClearThreads = 256;  // blocks per range of tokens

/// Block x: sequence x if it is null; then what follows the last sequence; then what precedes the first.
KDA_DEVICE Sequence unowned(ChunkPlan const& plan, int32_t x) {
  if (x < plan.sequences) {
    if (!plan.is_null(x)) return {};
    if (!plan.cu_seqlens) return {x, 0, plan.tokens, 0};
    int64_t const begin = plan.boundary(x);
    return {0, begin, plan.boundary(x + 1) - begin, 0};
  }
  if (!plan.cu_seqlens) return {};
  if (x > plan.sequences) return {0, 0, plan.boundary(0), 0};
  int64_t const begin = plan.boundary(plan.sequences);
  return {0, begin, plan.tokens - begin, 0};
}

/// One block.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kClearThreads) chunk_fwd_reset_kernel(uint32_t* counters, int64_t count) {
  let_next_kernel_start();
  for (int64_t i = thread_index(); i < count; i += kClearThreads) counters[i] = 0;
}

/// `o` is contiguous here.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kClearThreads) chunk_fwd_clear_kernel(ChunkFwdParams const p) {
  using E = typename Variant::Element;
  Sequence const range = unowned(p.plan, int32_t(blockIdx.x));
  int64_t const row = int64_t(p.value_heads) * p.value_dim, count = range.length * row;
  E* const o = static_cast<E*>(p.o.data) + (range.batch_row * p.plan.tokens + range.begin) * row;
  for (int64_t i = blockIdx.y * kClearThreads + thread_index(); i < count; i += kClearBlocks * kClearThreads)
    o[i] = from_float<E>(0.f);
}

}  // namespace kda
