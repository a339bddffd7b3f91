// A part of a sequence that blocks of their own work on, and the fp32 states that pass between them.
//
// Where sequences are split, three launches do the scan of a round:
//     summarise  every segment but the last one from zero: S_local; and from the identity: M (scan.h)
//     chain      S_start[j + 1] = S_start[j] M[j] + S_local[j], transposed states all (chain.h)
//     outputs    every segment once more, from its S_start
// Exact for every gate: rows of S^T evolve linearly and do not mix. State j of the segments holds S_start[j] once
// the chain is done, S_local[j - 1] before. The outputs pass does not read the initial states, so that they may be
// overwritten.
#pragma once
#include "kda/chunk/gate_columns.h"
#include "kda/chunk/record.h"
#include "tile/mma_tile.h"

namespace kda {

struct SegmentAt {
  float* state;       // S^T
  float* transition;  // M: a state s, as a row, becomes s M
  float* negligible;  // [key tiles of 64]: not 0: those rows of M are below kNegligible and were not written
};

template <class Variant>
KDA_DEVICE SegmentAt segment_at(ChunkCall const& p, int64_t segment, int value_head) {
  constexpr int kKeyTile = Variant::config.key_tile;
  float* const state = p.segments + (segment * p.value_heads + value_head) * segment_floats(p.value_dim, kKeyTile);
  float* const transition = state + state_floats(p.value_dim, kKeyTile);
  return {state, transition, transition + kKeyTile * kKeyTile};
}

/// The state that goes on into the next round. Rounds alternate.
template <class Variant>
KDA_DEVICE float* carry_at(ChunkCall const& p, int round, int value_head) {
  return p.carry +
         (int64_t(round % 2) * p.value_heads + value_head) * state_floats(p.value_dim, Variant::config.key_tile);
}

/// f(accumulator, its first element, two neighbours in `rows`).
template <int kKeyTiles, class F>
KDA_DEVICE void for_row_pairs(float* rows, StateSlice slice, F f) {
  float* const at = rows + (slice.row + lane_index() / 4) * slice.channels + slice.channel + lane_index() % 4 * 2;
#pragma unroll
  for (int d = 0; d < kKeyTiles; ++d)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      f(d, half * 2, reinterpret_cast<float2*>(at + half * 8 * slice.channels + d * 8));
}
template <int kKeyTiles>
KDA_DEVICE void load_rows(tile::Accumulator (&state)[kKeyTiles], float* rows, StateSlice slice) {
  for_row_pairs<kKeyTiles>(rows, slice, [&](int d, int e, float2 const* at) {
    float2 const pair = *at;
    state[d].x[e] = pair.x, state[d].x[e + 1] = pair.y;
  });
}
template <int kKeyTiles>
KDA_DEVICE void store_rows(tile::Accumulator const (&state)[kKeyTiles], float* rows, StateSlice slice) {
  for_row_pairs<kKeyTiles>(rows, slice, [&](int d, int e, float2* at) { *at = {state[d].x[e], state[d].x[e + 1]}; });
}
/// A slice of the identity.
template <int kKeyTiles>
KDA_DEVICE void set_identity(tile::Accumulator (&state)[kKeyTiles], StateSlice slice) {
  int const lane = lane_index(), diagonal = slice.row - slice.channel;
#pragma unroll
  for (int d = 0; d < kKeyTiles; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      state[d].x[e] = diagonal + lane / 4 + e / 2 * 8 == d * 8 + lane % 4 * 2 + e % 2 ? 1.f : 0.f;
}

/// Chunks [begin, end) of a sequence, for one head: a segment, as far as it lies in the round.
struct ScanWork {
  Sequence sequence;
  int64_t begin, end, chunks;
  int64_t segment;  // of the round
  int n, value_head;
  bool first;         // of the segments of this sequence in this round
  int64_t following;  // how many more of them
};

/// Of the round's segment `segment`, used or not. False: nothing. Sequences without chunks belong to the round that has
/// their first cell.
template <class Variant>
KDA_DEVICE bool find_scan_work(ScanWork& work, ChunkCall const& p, int64_t segment, int value_head) {
  ChunkPlan const plan = plan_of<Variant>(p), segments = p.plan.with_chunk(p.segment_tokens);
  int64_t const length = p.segment_tokens / Variant::config.chunk;  // in chunks
  bool const none = segments.cells() == 0;                          // no tokens: block n has sequence n
  int64_t cell = work.segment = segment;
  if (p.first_cell) {
    int32_t const n = plan.sequence_of_cell(p.first_cell);
    cell += segments.sequence(n).first_cell + (p.first_cell - plan.sequence(n).first_cell) / length;
  }
  work.n = none ? int(cell) : segments.sequence_of_cell(cell);
  work.value_head = value_head;
  if (work.n >= plan.sequences) return false;
  work.sequence = plan.sequence(work.n);
  work.chunks = plan.chunks_of(work.sequence.length);
  int64_t const i = none ? 0 : cell - segments.sequence(work.n).first_cell;
  int64_t const from = p.first_cell - work.sequence.first_cell, to = from + p.round_cells;  // as chunks of the sequence
  int64_t const round_begin = from > 0 ? from : 0, round_end = to < work.chunks ? to : work.chunks;
  work.begin = i * length > round_begin ? i * length : round_begin;
  work.end = (i + 1) * length < round_end ? (i + 1) * length : round_end;
  work.first = work.begin == round_begin;
  work.following = work.end < round_end ? (round_end - 1) / length - i : 0;
  return work.begin < work.end || (work.chunks == 0 && i == 0 && from <= 0 && (to > 0 || p.round_cells == 0));
}

}  // namespace kda
