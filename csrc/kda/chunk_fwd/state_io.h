// States between global memory, in any of their layouts, and the accumulators that hold S^T.
#pragma once
#include "kda/chunk_fwd/config.h"
#include "kda/chunk_fwd/params.h"
#include "tile/mma_tile.h"

namespace kda {

/// Where one state lies, and how its elements are ordered.
struct StateAt {
  void* data;  // null: no such state
  int64_t offset, key_stride, value_stride;
  StateType type;
};

KDA_DEVICE StateAt state_in_slot(StateRef const& ref, ChunkFwdParams const& p, int64_t slot, int value_head) {
  int64_t const offset = slot * ref.slot_stride + int64_t(value_head) * p.key_dim * p.value_dim;
  return {slot < 0 ? nullptr : ref.data, offset, ref.value_first ? 1 : p.value_dim, ref.value_first ? p.key_dim : 1,
          ref.type};
}

/// Where sequence n starts from.
KDA_DEVICE StateAt initial_state_at(ChunkFwdParams const& p, int n, int value_head) {
  bool const zero = !p.initial_state.data || (p.has_initial_state && !p.has_initial_state[n]);
  return state_in_slot(p.initial_state, p, zero ? -1 : p.initial_state.slots.of(n), value_head);
}

/// Where the state of sequence n after its last token goes.
KDA_DEVICE StateAt final_state_at(ChunkFwdParams const& p, int n, int value_head) {
  return state_in_slot(p.final_state, p, p.final_state.data ? p.final_state.slots.of(n) : -1, value_head);
}

/// Calls f(accumulator element, its place) for what exists of this warp's part of S^T.
template <class T, int kKeyTiles, class F>
KDA_DEVICE void for_state_of(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p,
                             StatePart part, F f) {
  int const v = part.row + lane_index() / 4, d = part.channel + lane_index() % 4 * 2;
  T* pair = static_cast<T*>(at.data) + at.offset + v * at.value_stride + d * at.key_stride;
  int64_t const next_row = 8 * at.value_stride, next_tile = 8 * at.key_stride;
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; ++tile, pair += next_tile)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (v + e / 2 * 8 < p.value_dim && d + e % 2 < p.key_dim - tile * 8)
        f(state[tile].x[e], pair + (e / 2 ? next_row : 0) + (e % 2 ? at.key_stride : 0));
}
template <int kKeyTiles, class F>
KDA_DEVICE void for_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p,
                          StatePart part, F f) {
  if (at.type == StateType::kFloat32) for_state_of<float>(state, at, p, part, f);
  else if (at.type == StateType::kBfloat16) for_state_of<Bf16>(state, at, p, part, f);
  else for_state_of<Fp16>(state, at, p, part, f);
}

/// S^T <- the state, or zero where there is none.
template <int kKeyTiles>
KDA_DEVICE void load_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p,
                           StatePart part) {
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; ++tile) state[tile] = tile::Accumulator{};
  if (at.data) for_state(state, at, p, part, [](float& x, auto const* from) { x = to_float(*from); });
}

template <int kKeyTiles>
KDA_DEVICE void store_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p,
                            StatePart part) {
  if (at.data)
    for_state(state, at, p, part,
              [](float x, auto* to) { *to = from_float<std::remove_reference_t<decltype(*to)>>(x); });
}

/// The first row of `chunk_states` that belongs to sequence n. All lanes of a warp.
KDA_DEVICE int64_t first_chunk_state(ChunkFwdParams const& p, int n) {
  int64_t const kept = p.chunk_state_tokens;
  if (!p.chunk_states.data) return 0;
  if (!p.plan.cu_seqlens) return n * ((p.plan.tokens + kept - 1) / kept);
  int64_t sum = 0;
  for (int i = lane_index(); i < n; i += 32) sum += (p.plan.sequence(i).length + kept - 1) / kept;
  return warp_sum(sum);
}

/// Where the state before `token` of a sequence is kept: row `first` + token / kept, if that is a boundary.
KDA_DEVICE StateAt chunk_state_at(ChunkFwdParams const& p, int64_t first, int64_t token, int value_head) {
  if (!p.chunk_states.data || token % p.chunk_state_tokens) return {};
  return state_in_slot(p.chunk_states, p, p.chunk_states.slots.of(first + token / p.chunk_state_tokens), value_head);
}

/// Where sequence n leaves its state after `tokens` tokens as a checkpoint.
KDA_DEVICE StateAt checkpoint_at(ChunkFwdParams const& p, int n, int64_t tokens, int value_head) {
  if (!p.checkpoints.data || tokens == 0 || tokens % p.checkpoint_tokens) return {};
  int64_t const column = tokens / p.checkpoint_tokens - 1;
  if (column >= p.checkpoints.slots.index.columns) return {};
  return state_in_slot(p.checkpoints, p, p.checkpoints.slots.of(n, column), value_head);
}

/// Before each chunk: the states that are kept at its first token.
template <int kKeyTiles>
KDA_DEVICE void keep_states(tile::Accumulator (&state)[kKeyTiles], ChunkFwdParams const& p, int n, int64_t first_row,
                            int64_t token, int value_head, StatePart part) {
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind)
    store_state(state, kind ? checkpoint_at(p, n, token, value_head) : chunk_state_at(p, first_row, token, value_head),
                p, part);
}

/// After the last chunk: the final state, which may be a checkpoint too.
template <int kKeyTiles>
KDA_DEVICE void finish_states(tile::Accumulator (&state)[kKeyTiles], ChunkFwdParams const& p, int n, int64_t length,
                              int value_head, StatePart part) {
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind)
    store_state(state, kind ? checkpoint_at(p, n, length, value_head) : final_state_at(p, n, value_head), p, part);
}

}  // namespace kda
