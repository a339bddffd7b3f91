// Which states the chunkwise forward starts from, keeps and leaves.
#pragma once
#include "kda/chunk/state_io.h"
#include "kda/chunk_fwd/params.h"

namespace kda {

/// Where sequence n starts from.
KDA_DEVICE StateAt initial_state_at(ChunkFwdParams const& p, int n, int value_head) {
  bool const zero = !p.initial_state.data || (p.has_initial_state && !p.has_initial_state[n]);
  return state_in_slot(p.initial_state, p, zero ? -1 : p.initial_state.slots.of(n), value_head);
}

/// Where the state of sequence n after its last token goes.
KDA_DEVICE StateAt final_state_at(ChunkFwdParams const& p, int n, int value_head) {
  return state_in_slot(p.final_state, p, p.final_state.data ? p.final_state.slots.of(n) : -1, value_head);
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
                            int64_t token, int value_head, StateSlice slice) {
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind)
    store_state(state, kind ? checkpoint_at(p, n, token, value_head) : chunk_state_at(p, first_row, token, value_head),
                p, slice);
}

/// After the last chunk: the final state, which may be a checkpoint too.
template <int kKeyTiles>
KDA_DEVICE void finish_states(tile::Accumulator (&state)[kKeyTiles], ChunkFwdParams const& p, int n, int64_t length,
                              int value_head, StateSlice slice) {
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind)
    store_state(state, kind ? checkpoint_at(p, n, length, value_head) : final_state_at(p, n, value_head), p, slice);
}

}  // namespace kda
