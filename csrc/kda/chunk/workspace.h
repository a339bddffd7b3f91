// What the host counts of the workspace of a chunkwise operation.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kda/chunk/plan.h"

namespace kda {

inline constexpr size_t kRecordAlignment = 1024;  // bytes, of the first cell

/// The first aligned byte of a workspace that is kRecordAlignment bytes larger than what is laid out in it.
inline char* align_workspace(void* workspace) {
  uintptr_t const at = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<char*>((at + kRecordAlignment - 1) / kRecordAlignment * kRecordAlignment);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// No more segments than this have chunks in a round of so many cells. Between the first and the last cell, d cells and
/// m sequences apart, lie (d - m) / L + m segments, and less than one each for where the chunk and its sequence begin.
inline int64_t round_segments(ChunkPlan const& plan, int64_t round_cells, int64_t segment_chunks) {
  int64_t const all = plan.with_chunk(segment_chunks * plan.chunk).cells();
  if (round_cells == 0) return plan.sequences;
  int64_t const further = std::min<int64_t>(plan.sequences, round_cells) - 1;
  return std::min(all, 1 + (round_cells - 1 + (further + 2) * (segment_chunks - 1)) / segment_chunks);
}

/// A segment that has every chunk of any sequence.
inline int64_t unsplit_chunks(ChunkPlan const& plan) { return plan.chunks_of(plan.tokens) + 1; }

}  // namespace kda
