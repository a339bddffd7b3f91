// From the summaries of segments to the state that each starts from. One block per sequence, value head and 16 rows of
// S^T, segment after segment; in fp32 throughout.
//
//     S_start[j + 1] = S_start[j] M[j] + S_local[j]
#pragma once
#include "kda/chunk/segments.h"

namespace kda {

template <class Variant>
struct ChainShape {
  static constexpr int kRows = 16, kKeyTile = Variant::config.key_tile;
  static constexpr int kThreads = 128, kLanes = kKeyTile / 4;   // threads that share a row of M, a float4 each
  static constexpr int kGroups = kThreads / kLanes;             // of threads: each sums over its own rows of M
  static constexpr int kDepth = kKeyTile / kGroups, kStep = 8;  // rows of M per group; that are loaded at once
  static constexpr int kPieces = kRows * kLanes / kThreads;     // float4s of the state per thread
  static_assert(kDepth % kStep == 0 && 64 % kStep == 0 && kValueTile % kRows == 0);
};

template <class Variant>
struct ChainStorage {
  using Shape = ChainShape<Variant>;
  float4 sum[Shape::kGroups][Shape::kRows][Shape::kLanes];
  float state[Shape::kRows][Shape::kKeyTile];
};

KDA_DEVICE void add_product(float4& sum, float x, float4 const& m) {
  sum.x += x * m.x, sum.y += x * m.y, sum.z += x * m.z, sum.w += x * m.w;
}
KDA_DEVICE void add(float4& sum, float4 const& x) { sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w; }

/// sum <- this group's share of the rows of `state` times M.
template <class Variant>
KDA_DEVICE void multiply_by_transition(ChainStorage<Variant>& s, SegmentAt const& segment) {
  using Shape = ChainShape<Variant>;
  int const group = thread_index() / Shape::kLanes, lane = thread_index() % Shape::kLanes;
  float4 sum[Shape::kRows] = {};
#pragma unroll 1
  for (int d = group * Shape::kDepth; d < (group + 1) * Shape::kDepth; d += Shape::kStep) {
    if (segment.negligible[d / 64] != 0.f) continue;
    float4 m[Shape::kStep];
#pragma unroll
    for (int i = 0; i < Shape::kStep; ++i)
      m[i] = reinterpret_cast<float4 const*>(segment.transition + (d + i) * Shape::kKeyTile)[lane];
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row)
#pragma unroll
      for (int i = 0; i < Shape::kStep; i += 4) {
        float4 const x = *reinterpret_cast<float4 const*>(&s.state[row][d + i]);
        add_product(sum[row], x.x, m[i]), add_product(sum[row], x.y, m[i + 1]);
        add_product(sum[row], x.z, m[i + 2]), add_product(sum[row], x.w, m[i + 3]);
      }
  }
#pragma unroll
  for (int row = 0; row < Shape::kRows; ++row) s.sum[group][row][lane] = sum[row];
}

/// Only the block of a sequence's first segment in the round works, on all of them.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(ChainShape<Variant>::kThreads) chunk_fwd_chain_kernel(ChunkCall const p) {
  using Shape = ChainShape<Variant>;
  KDA_DYNAMIC_SHARED(ChainStorage<Variant>, storage);
  auto& s = *storage;
  ScanWork work;
  if (!find_scan_work<Variant>(work, p, blockIdx.x, blockIdx.y) || !work.first || work.following == 0) return;
  int64_t const rows = int64_t(blockIdx.z) * Shape::kRows * Shape::kKeyTile;  // where this block's begin
  auto const state_of = [&](int64_t j) {
    return reinterpret_cast<float4*>(segment_at<Variant>(p, work.segment + j, work.value_head).state + rows);
  };
  float4* const state = reinterpret_cast<float4*>(s.state);
  int const thread = thread_index();
#pragma unroll
  for (int i = 0; i < Shape::kPieces; ++i)  // S_start[1] = S_local[0], which began from the first segment's start
    state[i * Shape::kThreads + thread] = state_of(1)[i * Shape::kThreads + thread];
  sync_block();
  for (int64_t j = 1; j < work.following; ++j) {
    float4 local[Shape::kPieces];
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) local[i] = state_of(j + 1)[i * Shape::kThreads + thread];
    multiply_by_transition(s, segment_at<Variant>(p, work.segment + j, work.value_head));
    sync_block();
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      int const piece = i * Shape::kThreads + thread;
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group) add(local[i], (&s.sum[group][0][0])[piece]);
      state_of(j + 1)[piece] = state[piece] = local[i];
    }
    sync_block();
  }
}

}  // namespace kda
