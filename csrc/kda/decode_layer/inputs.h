// What one head of a layer's token is made of. All of it is on its way before any of it is used, and each channel of
// the three convolutions has a thread: a chain of loads would take longer than everything else.
#pragma once
#include "kda/decode/token.h"
#include "kda/decode_layer/params.h"

namespace kda {

/// Item i of the block: channel i % kKeyTile of q, k and v before their convolutions (streams 0, 1, 2), and of the gate
/// (3). Thread t has items t, t + kThreads, ...; and of the output gate and the norm's weight channel t.
template <class Shape>
class LayerInputs {
  static constexpr int kKeyTile = Shape::kKeyTile, kThreads = Shape::kThreads, kItems = 4 * kKeyTile / kThreads;
  static constexpr int kGate = 3;
  static_assert(kItems * kThreads == 4 * kKeyTile && kThreads >= kKeyTile && kKeyTile % 32 == 0);

 public:
  /// Starts the loads.
  KDA_DEVICE LayerInputs(DecodeLayerParams const& p, DecodeWork const& work, int64_t slot) {
    DecodeParams const& step = p.step;
    int const dim = step.key_dim;
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      if (channel(e) >= dim) continue;
      if (stream(e) == kGate) load_gate(item_[e], step, work, channel(e));
      else load_stream(item_[e], p, work, slot, stream(e), channel(e));
    }
    if (step.gate.kind != GateKind::kLogDecay && step.gate.A_log) A_log_ = step.gate.A_log[work.value_head];
    if (thread_index() == 0)
      betas(step).with_words(step.beta,
                             [&](auto const* x) { beta_ = x[work.offset(step.beta_strides, 0, work.head)]; });
    if (int const c = thread_index(); c < step.value_dim) {
      int64_t const at = work.offset(p.output_gate_strides, 0, work.head) + c;
      ElementFormat(step.dtype).with_words(p.output_gate, [&](auto const* x) { output_gate_ = x[at]; });
      weights(p).with_words(p.norm_weight, [&](auto const* x) { norm_weight_ = x[c]; });
    }
  }

  /// q and k after their convolutions, v, the decays and beta. The state of the convolutions moves on.
  KDA_DEVICE void finish(DecodeToken<kKeyTile, kKeyTile>& to, DecodeLayerParams const& p, DecodeWork const& work,
                         int64_t slot) const {
    DecodeParams const& step = p.step;
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      int const c = channel(e);
      bool const present = c < step.key_dim;
      if (stream(e) == kGate) {
        float const amplitude = step.gate.kind != GateKind::kLogDecay && step.gate.A_log ? exp_accurate(A_log_) : 1.f;
        float const raw = present ? ElementFormat(step.dtype, step.g_is_fp32).value(item_[e].x) : 0.f;
        float const bias = present ? bits_to_float(item_[e].weight[0]) : 0.f;
        to.decay[c] = exp_accurate(ChannelGate(step.gate, present ? amplitude : 1.f, bias).log_decay(raw));
      } else {
        float* const row = stream(e) == 0 ? to.q : stream(e) == 1 ? to.k : to.v;
        row[c] = present ? convolve(item_[e], p, place(p, work, slot, stream(e), c)) : 0.f;
      }
    }
    if (thread_index() == 0) to.beta = write_strength(step, betas(step).value(beta_));
  }

  /// Of this thread's channel, if there is one: the norm's weight and the sigmoid of the output gate.
  KDA_DEVICE void finish_norm(float* weight, float* open, DecodeLayerParams const& p) const {
    int const c = thread_index();
    if (c >= p.step.value_dim) return;
    weight[c] = weights(p).value(norm_weight_), open[c] = sigmoid(ElementFormat(p.step.dtype).value(output_gate_));
  }

 private:
  struct Item {
    uint32_t x, past[kConvTaps - 1], weight[kConvTaps];  // of the gate: x, and its bias in weight[0]
  };
  Item item_[kItems];
  float A_log_ = 0.f;
  uint32_t beta_ = 0, output_gate_ = 0, norm_weight_ = 0;

  KDA_DEVICE static int channel(int e) { return (thread_index() + e * kThreads) % kKeyTile; }
  KDA_DEVICE static int stream(int e) { return (thread_index() + e * kThreads) / kKeyTile; }  // of the whole warp
  KDA_DEVICE static ElementFormat betas(DecodeParams const& p) { return {p.dtype, p.beta_is_fp32}; }
  KDA_DEVICE static ElementFormat weights(DecodeLayerParams const& p) { return {p.step.dtype, p.norm_weight_is_fp32}; }

  /// Where the past inputs of a channel begin.
  KDA_DEVICE static int64_t place(DecodeLayerParams const& p, DecodeWork const& work, int64_t slot, int stream, int c) {
    int64_t const row = (int64_t(stream) * p.step.heads + work.head) * p.step.key_dim + c;
    return slot * p.conv.slot_stride + row * p.conv.channel_stride;
  }

  KDA_DEVICE static void load_gate(Item& to, DecodeParams const& step, DecodeWork const& work, int c) {
    int64_t const at = work.offset(step.g_strides, 0, work.head) + c;
    ElementFormat(step.dtype, step.g_is_fp32).with_words(step.g, [&](auto const* x) { to.x = x[at]; });
    bool const has_bias = step.gate.kind != GateKind::kLogDecay && step.gate.dt_bias;
    to.weight[0] = has_bias ? float_to_bits(step.gate.dt_bias[work.value_head * step.key_dim + c]) : 0u;
  }
  KDA_DEVICE static void load_stream(Item& to, DecodeLayerParams const& p, DecodeWork const& work, int64_t slot,
                                     int stream, int c) {
    DecodeParams const& step = p.step;
    ShortConvParams const& conv = p.conv;
    int64_t const at = place(p, work, slot, stream, c);
    ElementFormat(step.dtype, conv.state_is_fp32).with_words(conv.state, [&](auto const* x) {
#pragma unroll
      for (int j = 0; j < kConvTaps - 1; ++j) to.past[j] = x[at + j * conv.tap_stride];
    });
    int64_t const filter = (int64_t(work.head) * step.key_dim + c) * kConvTaps;
    ElementFormat(step.dtype, conv.weight_is_fp32).with_words(conv.weight[stream], [&](auto const* x) {
#pragma unroll
      for (int j = 0; j < kConvTaps; ++j) to.weight[j] = x[filter + j];
    });
    void const* const from = stream == 0 ? step.q : stream == 1 ? step.k : step.v;
    int64_t const row = stream == 0   ? work.offset(step.q_strides, 0, work.head)
                        : stream == 1 ? work.offset(step.k_strides, 0, work.head)
                                      : work.offset(step.v_strides, 0, work.head);
    ElementFormat(step.dtype).with_words(from, [&](auto const* x) { to.x = x[row + c]; });
  }

  /// SiLU(sum_j w_j x_{t - 3 + j}); x joins the past inputs in the place of the oldest one.
  KDA_DEVICE static float convolve(Item const& item, DecodeLayerParams const& p, int64_t at) {
    ShortConvParams const& conv = p.conv;
    Dtype const dtype = p.step.dtype;
    ElementFormat const states(dtype, conv.state_is_fp32), filters(dtype, conv.weight_is_fp32);
    float const x = ElementFormat(dtype).value(item.x);
    float past[kConvTaps - 1], sum = 0.f;
#pragma unroll
    for (int j = 0; j < kConvTaps - 1; ++j) past[j] = states.value(item.past[j]);
#pragma unroll
    for (int j = 0; j < kConvTaps; ++j) sum = fmaf(filters.value(item.weight[j]), j < kConvTaps - 1 ? past[j] : x, sum);
#pragma unroll
    for (int j = 0; j < kConvTaps - 1; ++j)
      store_float(conv.state, conv.state_is_fp32 ? Dtype::kFloat32 : dtype, at + j * conv.tap_stride,
                  j < kConvTaps - 2 ? past[j + 1] : x);
    return sum * sigmoid(sum);
  }
};

}  // namespace kda
