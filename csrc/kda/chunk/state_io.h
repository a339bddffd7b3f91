// States between global memory, in any of their layouts, and the accumulators that hold S^T.
#pragma once
#include "kda/chunk/inputs.h"
#include "kda/chunk/shape.h"
#include "tile/mma_tile.h"

namespace kda {

/// Where one state lies, and how its elements are ordered.
struct StateAt {
  void* data;  // null: no such state
  int64_t offset, key_stride, value_stride;
  Dtype type;
};

KDA_DEVICE StateAt state_in_slot(StateRef const& ref, ChunkInputs const& p, int64_t slot, int value_head) {
  int64_t const offset = slot * ref.slot_stride + int64_t(value_head) * p.key_dim * p.value_dim;
  return {slot < 0 ? nullptr : ref.data, offset, ref.value_first ? 1 : p.value_dim, ref.value_first ? p.key_dim : 1,
          ref.type};
}

/// Calls f(accumulator element, its place) for what exists of this warp's slice of S^T.
template <class T, int kKeyTiles, class F>
KDA_DEVICE void for_state_of(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkInputs const& p,
                             StateSlice slice, F f) {
  int const v = slice.row + lane_index() / 4, d = slice.channel + lane_index() % 4 * 2;
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
KDA_DEVICE void for_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkInputs const& p,
                          StateSlice slice, F f) {
  if (at.type == Dtype::kFloat32) for_state_of<float>(state, at, p, slice, f);
  else if (at.type == Dtype::kBfloat16) for_state_of<Bf16>(state, at, p, slice, f);
  else for_state_of<Fp16>(state, at, p, slice, f);
}

/// S^T <- the state, or zero where there is none.
template <int kKeyTiles>
KDA_DEVICE void load_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkInputs const& p,
                           StateSlice slice) {
#pragma unroll
  for (int tile = 0; tile < kKeyTiles; ++tile) state[tile] = tile::Accumulator{};
  if (at.data) for_state(state, at, p, slice, [](float& x, auto const* from) { x = to_float(*from); });
}

template <int kKeyTiles>
KDA_DEVICE void store_state(tile::Accumulator (&state)[kKeyTiles], StateAt const& at, ChunkInputs const& p,
                            StateSlice slice) {
  if (at.data)
    for_state(state, at, p, slice,
              [](float x, auto* to) { *to = from_float<std::remove_reference_t<decltype(*to)>>(x); });
}

}  // namespace kda
