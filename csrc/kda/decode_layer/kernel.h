// One decoding step of a whole KDA layer, per block one head of one sequence: convolutions, recurrence, gated RMSNorm.
#pragma once
#include "kda/decode/kernel.h"
#include "kda/decode_layer/params.h"

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
  float o[Shape::kKeyTile];
};

/// A channel of stream 0, 1 or 2 (q, k, v): its input x becomes SiLU(sum_j w_j x_{t - 3 + j}), its state moves on.
/// One thread.
KDA_DEVICE float convolve(DecodeLayerParams const& p, int64_t slot, int stream, int channel, float x) {
  ShortConvParams const& conv = p.conv;
  Dtype const dtype = p.step.dtype;
  int64_t const width = int64_t(p.step.heads) * p.step.key_dim;
  int64_t const at = slot * conv.slot_stride + (stream * width + channel) * conv.channel_stride;
  float past[kConvTaps - 1], sum = 0.f;
#pragma unroll
  for (int j = 0; j < kConvTaps - 1; ++j)
    past[j] = load_as_float(conv.state, conv.state_is_fp32, dtype, at + j * conv.tap_stride);
#pragma unroll
  for (int j = 0; j < kConvTaps; ++j) {
    float const w = load_as_float(conv.weight[stream], conv.weight_is_fp32, dtype, int64_t(channel) * kConvTaps + j);
    sum = fmaf(w, j < kConvTaps - 1 ? past[j] : x, sum);
  }
#pragma unroll
  for (int j = 0; j < kConvTaps - 1; ++j)
    store_float(conv.state, conv.state_is_fp32 ? Dtype::kFloat32 : dtype, at + j * conv.tap_stride,
                j < kConvTaps - 2 ? past[j + 1] : x);
  return sum * sigmoid(sum);
}

/// The token in shared memory: q, k and beta by the first warp, v and the decays by the others.
template <int kKeyTile>
KDA_DEVICE void prepare_layer_token(DecodeToken<kKeyTile, kKeyTile>& to, DecodeLayerParams const& p,
                                    DecodeWork const& work, int64_t slot, int warps) {
  constexpr int kChannels = kKeyTile / 32;
  DecodeParams const& step = p.step;
  int const dim = step.key_dim, first = work.head * dim;
  auto const input = [&](void const* x, RowStrides const& strides, int c) {
    return load_as_float(x, false, step.dtype, work.offset(strides, 0, work.head) + c);
  };
  if (thread_index() >= 32) {
    int64_t const g = work.offset(step.g_strides, 0, work.head);
    for (int c = thread_index() - 32; c < kKeyTile; c += 32 * (warps - 1)) {
      bool const present = c < dim;
      to.v[c] = present ? convolve(p, slot, 2, first + c, input(step.v, step.v_strides, c)) : 0.f;
      float const raw = present ? load_as_float(step.g, step.g_is_fp32, step.dtype, g + c) : 0.f;
      to.decay[c] = exp_accurate(ChannelGate(step.gate, work.value_head, c, dim).log_decay(raw));
    }
    return;
  }
  float q[kChannels], k[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    int const c = lane_index() + 32 * i;
    q[i] = c < dim ? convolve(p, slot, 0, first + c, input(step.q, step.q_strides, c)) : 0.f;
    k[i] = c < dim ? convolve(p, slot, 1, first + c, input(step.k, step.k_strides, c)) : 0.f;
  }
  if (lane_index() == 0) {
    int64_t const beta = work.offset(step.beta_strides, 0, work.head);
    to.beta = write_strength(step, load_as_float(step.beta, step.beta_is_fp32, step.dtype, beta));
  }
  finish_keys(to, q, k, step, work, 0);
}

/// out = o / sqrt(mean o^2 + eps) * weight * sigmoid(gate)
KDA_DEVICE void store_gated_norm(DecodeLayerParams const& p, DecodeWork const& work, float const* o, int threads) {
  DecodeParams const& step = p.step;
  float square = 0.f;
  for (int c = lane_index(); c < step.value_dim; c += 32) square = fmaf(o[c], o[c], square);
  float const scale = rsqrt_accurate(warp_sum(square) / float(step.value_dim) + p.norm_eps);
  int64_t const out = work.offset(step.o_strides, 0, work.head),
                gate = work.offset(p.output_gate_strides, 0, work.head);
  for (int c = thread_index(); c < step.value_dim; c += threads) {
    float const weight = load_as_float(p.norm_weight, p.norm_weight_is_fp32, step.dtype, c);
    float const open = sigmoid(load_as_float(p.output_gate, false, step.dtype, gate + c));
    store_float(step.o, step.dtype, out + c, o[c] * scale * weight * open);
  }
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

#pragma unroll 1
  for (int first = 0; first < step.value_dim; first += Shape::kValueTile) {
    StateTile<Shape> tile(step, first);
    tile.fetch(state);
    if (first == 0) {
      prepare_layer_token(storage->token, p, work, slot, Shape::kWarps);
      sync_block();
    }
    tile.finish_fetch();
    decode_step(tile, storage->token, storage->token.v + first, storage->exchange, step.scale,
                [&](int value, float o, float) { storage->o[first + value] = o; });
    tile.store(state);
  }
  sync_block();
  store_gated_norm(p, work, storage->o, Shape::kThreads);
}

}  // namespace kda
