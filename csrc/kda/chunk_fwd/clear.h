// What is set to zero before the work: counters of the workspace, and the output for tokens that no sequence computes:
// those of sequences with a null slot, and those outside of cu_seqlens, as a captured graph has them when it is
// replayed with fewer tokens.
#pragma once
#include "kda/chunk/unowned.h"
#include "kda/chunk_fwd/params.h"

namespace kda {

/// One block.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kClearThreads) chunk_fwd_reset_kernel(uint32_t* counters, int64_t count) {
  let_next_kernel_start();
  for (int64_t i = thread_index(); i < count; i += kClearThreads) counters[i] = 0;
}

/// What the blocks of chunk_fwd_clear_kernel begin with: without indices of slots no sequence is null.
KDA_HOST_DEVICE int32_t first_unowned(ChunkPlan const& plan) {
  return plan.state_slots.index.data ? 0 : plan.sequences;
}

/// `o` is contiguous here.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kClearThreads) chunk_fwd_clear_kernel(ChunkFwdParams const p) {
  using E = typename Variant::Element;
  Sequence const range = unowned(p.plan, first_unowned(p.plan) + int32_t(blockIdx.x));
  int64_t const row = int64_t(p.value_heads) * p.value_dim, count = range.length * row;
  E* const o = static_cast<E*>(p.o.data) + (range.batch_row * p.plan.tokens + range.begin) * row;
  for (int64_t i = blockIdx.y * kClearThreads + thread_index(); i < count; i += kClearBlocks * kClearThreads)
    o[i] = from_float<E>(0.f);
}

}  // namespace kda
