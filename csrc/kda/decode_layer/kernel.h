// One decoding step of a whole KDA layer, per block one head of one sequence: convolutions, recurrence, gated RMSNorm.
#pragma once
#include "kda/decode/kernel.h"
#include "kda/decode_layer/inputs.h"

namespace kda {

/// Enough warps for all values of a head of K = V = 64 or 128 at once; of 256 in passes of 16 warps.
template <class State, int kKeyTile, bool kVector>
inline constexpr int kWarpsOfHead = kKeyTile / ValueFirstShape<State, kKeyTile, kVector>::kRowsPerWarp;
template <class State, int kKeyTile, bool kVector>
using LayerShape = ValueFirstShape < State,
      kKeyTile, kVector, kWarpsOfHead<State, kKeyTile, kVector><16 ? kWarpsOfHead<State, kKeyTile, kVector> : 16>;

template <class Shape>
struct DecodeLayerStorage {
  static_assert(Shape::kKeyTile % Shape::kValueTile == 0);
  typename StateTile<Shape>::Exchange exchange;
  DecodeToken<Shape::kKeyTile, Shape::kKeyTile> token;
  float o[Shape::kKeyTile], weight[Shape::kKeyTile], open[Shape::kKeyTile];  // of the norm and its gate
};

/// Everything in shared memory. By all threads; the keys once more by the first warp, which has their norms.
template <class Shape>
KDA_DEVICE void prepare_layer_token(DecodeLayerStorage<Shape>& s, LayerInputs<Shape> const& inputs,
                                    DecodeLayerParams const& p, DecodeWork const& work, int64_t slot) {
  constexpr int kChannels = Shape::kKeyTile / 32;
  inputs.finish(s.token, p, work, slot);
  inputs.finish_norm(s.weight, s.open, p);
  sync_block();
  if (thread_index() < 32) {
    float q[kChannels], k[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      q[i] = s.token.q[lane_index() + 32 * i], k[i] = s.token.k[lane_index() + 32 * i];
    finish_keys(s.token, q, k, p.step, work, 0);
  }
  sync_block();
}

/// out = o / sqrt(mean o^2 + eps) * weight * sigmoid(gate)
template <class Shape>
KDA_DEVICE void store_gated_norm(DecodeLayerParams const& p, DecodeWork const& work,
                                 DecodeLayerStorage<Shape> const& s) {
  DecodeParams const& step = p.step;
  float square = 0.f;
  for (int c = lane_index(); c < step.value_dim; c += 32) square = fmaf(s.o[c], s.o[c], square);
  float const scale = rsqrt_accurate(warp_sum(square) / float(step.value_dim) + p.norm_eps);
  if (int const c = thread_index(); c < step.value_dim)
    store_float(step.o, step.dtype, work.offset(step.o_strides, 0, work.head) + c,
                s.o[c] * scale * s.weight[c] * s.open[c]);
}

template <class Shape>
KDA_GLOBAL void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM) decode_layer_kernel(DecodeLayerParams const p) {
  using State = typename Shape::State;
  KDA_DYNAMIC_SHARED(DecodeLayerStorage<Shape>, storage);
  take_over();
  DecodeParams const& step = p.step;
  DecodeWork const work(step, step.value_heads, step.value_dim);
  int64_t const at = work.state_offset(step.state, step, 0), slot = work.slot(step.state, step, 0);
  if (at < 0 || slot >= p.conv.slots) return zero_sequence(step, work, step.value_dim, Shape::kThreads);
  State* const state = static_cast<State*>(step.state.data) + at;
  LayerInputs<Shape> const inputs(p, work, slot);

#pragma unroll 1
  for (int first = 0; first < step.value_dim; first += Shape::kValueTile) {
    StateTile<Shape> tile(step, first);
    tile.fetch(state);
    if (first == 0) prepare_layer_token(*storage, inputs, p, work, slot);
    tile.finish_fetch();
    decode_step(tile, storage->token, storage->token.v + first, storage->exchange, step.scale,
                [&](int value, float o, float) { storage->o[first + value] = o; });
    tile.store(state);
  }
  sync_block();
  store_gated_norm<Shape>(p, work, *storage);
}

}  // namespace kda
