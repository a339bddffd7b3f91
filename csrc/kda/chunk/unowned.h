// Tokens that no sequence computes: those of sequences with a null slot, and those outside of cu_seqlens, as a captured
// graph has them when it is replayed with fewer tokens.
#pragma once
#include "kda/chunk/plan.h"

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

}  // namespace kda
