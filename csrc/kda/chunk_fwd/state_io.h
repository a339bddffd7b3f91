// States between global memory, in any of their layouts, and the accumulators that hold S^T.
#pragma once
#include "kda/chunk_fwd/params.h"
#include "tile/mma_tile.h"

namespace kda {

/// Where one state lies, and how its elements are ordered.
struct StateAt {
  void* data;  // null: no such state
  int64_t offset, key_stride, value_stride;
  StateType type;
};

KDA_DEVICE StateAt state_at(StateRef const& ref, ChunkFwdParams const& p, int sequence, int value_head) {
  int64_t slot = sequence;
  if (ref.data && ref.slot_of) slot = ref.slot_of[sequence];
  bool const absent = !ref.data || slot < 0 || slot >= ref.slots;
  int64_t const offset = slot * ref.slot_stride + int64_t(value_head) * p.key_dim * p.value_dim;
  return {absent ? nullptr : ref.data, offset, ref.value_first ? 1 : p.value_dim, ref.value_first ? p.key_dim : 1,
          ref.type};
}

KDA_DEVICE float load_state_element(StateAt const& s, int64_t i) {
  switch (s.type) {
    case StateType::kFloat32:
      return static_cast<float const*>(s.data)[i];
    case StateType::kBfloat16:
      return to_float(static_cast<Bf16 const*>(s.data)[i]);
    default:
      return to_float(static_cast<Fp16 const*>(s.data)[i]);
  }
}

KDA_DEVICE void store_state_element(StateAt const& s, int64_t i, float x) {
  switch (s.type) {
    case StateType::kFloat32:
      static_cast<float*>(s.data)[i] = x;
      break;
    case StateType::kBfloat16:
      static_cast<Bf16*>(s.data)[i] = from_float<Bf16>(x);
      break;
    default:
      static_cast<Fp16*>(s.data)[i] = from_float<Fp16>(x);
  }
}

/// Calls f(accumulator element, offset in the state) for this warp's rows of S^T that exist; `value` is its first.
template <int kKeyTiles, class F>
KDA_DEVICE void for_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p, int value,
                          F f) {
  int const lane = lane_index();
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; ++tile)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const v = value + lane / 4 + e / 2 * 8, d = tile * 8 + lane % 4 * 2 + e % 2;
      if (v < p.value_dim && d < p.key_dim) f(state[tile].x[e], at.offset + d * at.key_stride + v * at.value_stride);
    }
}

/// S^T <- the state, or zero where there is none.
template <int kKeyTiles>
KDA_DEVICE void load_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p,
                           int value) {
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; ++tile) state[tile] = tile::Accumulator{};
  if (at.data) for_state(state, at, p, value, [&](float& x, int64_t i) { x = load_state_element(at, i); });
}

template <int kKeyTiles>
KDA_DEVICE void store_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkFwdParams const& p,
                            int value) {
  if (at.data) for_state(state, at, p, value, [&](float& x, int64_t i) { store_state_element(at, i, x); });
}

/// The first row of `chunk_states` that belongs to sequence n. All lanes of a warp.
KDA_DEVICE int64_t first_chunk_state(ChunkFwdParams const& p, int n) {
  int64_t const kept = p.chunk_state_tokens;
  if (!p.plan.cu_seqlens) return n * ((p.plan.tokens + kept - 1) / kept);
  int64_t sum = 0;
  for (int i = lane_index(); i < n; i += 32) sum += (p.plan.sequence(i).length + kept - 1) / kept;
  return warp_sum(sum);
}

/// Where the state before `token` of a sequence is kept: row `first` + token / kept, if that is a boundary.
KDA_DEVICE StateAt chunk_state_at(ChunkFwdParams const& p, int64_t first, int64_t token, int value_head) {
  if (!p.chunk_states || token % p.chunk_state_tokens) return {};
  int64_t const row = first + token / p.chunk_state_tokens;
  if (row >= p.chunk_state_rows) return {};
  return {p.chunk_states, (row * p.value_heads + value_head) * p.key_dim * p.value_dim,
          p.chunk_states_value_first ? 1 : p.value_dim, p.chunk_states_value_first ? p.key_dim : 1,
          p.chunk_states_type};
}

}  // namespace kda
