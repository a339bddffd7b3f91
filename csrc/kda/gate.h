// The gate: from what the layer projects to the log-decay g <= 0 of each key channel (docs/mathematics.md, section 1).
#pragma once
#include "platform/math.h"

namespace kda {

enum class GateKind : int32_t {
  kLogDecay,  // g as it is
  kSoftplus,  // g = -exp(A_log) softplus(x + dt_bias)
  kBounded,   // g = lower_bound sigmoid(exp(A_log) (x + dt_bias))
};

struct GateParams {
  GateKind kind;
  float const* A_log;    // [value_heads]; null: exp(A_log) = 1
  float const* dt_bias;  // [value_heads, key_dim]; null: 0
  float lower_bound;
};

/// Accurate for every x: no overflow, no cancellation.
KDA_DEVICE float softplus(float x) { return (x > 0.f ? x : 0.f) + log1p_accurate(exp_accurate(x > 0.f ? -x : x)); }
KDA_DEVICE float sigmoid(float x) { return 1.f / (1.f + exp_accurate(-x)); }

/// log2(1 + 2^y). Relative error below 2^-16, an eighth of bf16's ulp in any sum over the memory of a channel: one
/// exponential, and the minimax polynomial of log2(1 + e) / e over [0, 1].
KDA_DEVICE float log2_softplus_fast(float y) {
  float const e = exp2_fast(-fabsf(y));
  float const tail =
      (((((-0.0344359055f * e + 0.146032885f) * e - 0.303036213f) * e + 0.469174057f) * e - 0.720426142f) * e +
       1.44268286f);
  return fmaxf(y, 0.f) + e * tail;
}
/// 1 / (1 + 2^-y)
KDA_DEVICE float sigmoid_fast(float y) { return reciprocal_fast(1.f + exp2_fast(-y)); }

/// The gate of one channel of one head.
struct ChannelGate {
  GateKind kind;
  float amplitude;  // exp(A_log)
  float bias, lower_bound;

  KDA_DEVICE ChannelGate(GateParams const& p, int value_head, int channel, int key_dim)
      : kind(p.kind), amplitude(1.f), bias(0.f), lower_bound(p.lower_bound) {
    if (kind == GateKind::kLogDecay || channel >= key_dim) return;
    if (p.A_log) amplitude = exp_accurate(p.A_log[value_head]);
    if (p.dt_bias) bias = p.dt_bias[value_head * key_dim + channel];
  }

  KDA_DEVICE ChannelGate(GateParams const& p, float known_amplitude, float known_bias)
      : kind(p.kind), amplitude(known_amplitude), bias(known_bias), lower_bound(p.lower_bound) {}

  KDA_DEVICE float log_decay(float x) const {
    switch (kind) {
      case GateKind::kSoftplus:
        return -amplitude * softplus(x + bias);
      case GateKind::kBounded:
        return lower_bound * sigmoid(amplitude * (x + bias));
      default:
        return x;
    }
  }

  /// d log_decay / dx, and d log_decay / dA_log (the amplitude's own derivative included).
  KDA_DEVICE float2 derivatives(float x) const {
    float const y = x + bias;
    if (kind == GateKind::kSoftplus) return {-amplitude * sigmoid(y), -amplitude * softplus(y)};
    float const z = amplitude * y, slope = lower_bound * sigmoid(z) * sigmoid(-z) * amplitude;
    return {slope, slope * y};
  }
};

/// 2^x for decays: accurate for fp32 elements, by the special function units for coarser ones.
template <class E>
KDA_DEVICE float decay_exp2(float x) {
  if constexpr (sizeof(E) == 4) return exp2_accurate(x);
  else return exp2_fast(x);
}

/// x[j] <- log2 of the decay. For fp32 elements accurate; for coarser ones by the special function units. The kind is
/// chosen outside the loop: its body is inlined kCount times.
template <class E, int kCount>
KDA_DEVICE void log2_decays(float (&x)[kCount], ChannelGate const& gate) {
  constexpr bool kAccurate = sizeof(E) == 4;
  constexpr float kLog2e = 1.4426950408889634f;
  if (gate.kind == GateKind::kSoftplus) {
    float const amplitude = kAccurate ? -gate.amplitude * kLog2e : -gate.amplitude, bias = kLog2e * gate.bias;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      x[j] = amplitude * (kAccurate ? softplus(x[j] + gate.bias) : log2_softplus_fast(kLog2e * x[j] + bias));
  } else if (gate.kind == GateKind::kBounded) {
    float const bound = gate.lower_bound * kLog2e, slope = kLog2e * gate.amplitude, bias = slope * gate.bias;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      x[j] = bound * (kAccurate ? sigmoid(gate.amplitude * (x[j] + gate.bias)) : sigmoid_fast(slope * x[j] + bias));
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] *= kLog2e;
  }
}

/// x[j] <- d log_decay / dx of two channels, and d log_decay / dA_log, as precisely as elements E can use.
/// `log2_decay`: of token j, as log2_decays has it.
template <class E, int kCount, class F>
KDA_DEVICE void gate_derivatives(float2 (&x)[kCount], float2 (&of_amplitude)[kCount], F log2_decay,
                                 ChannelGate const& gate0, ChannelGate const& gate1) {
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  auto const set = [&](int j, float2 first, float2 second) {
    x[j] = {first.x, second.x}, of_amplitude[j] = {first.y, second.y};
  };
  if constexpr (sizeof(E) == 4) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) set(j, gate0.derivatives(x[j].x), gate1.derivatives(x[j].y));
  } else if (gate0.kind == GateKind::kSoftplus) {
    auto const slope = [](ChannelGate const& gate, float x) {
      return -gate.amplitude * sigmoid_fast(kLog2e * (x + gate.bias));
    };
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      x[j] = {slope(gate0, x[j].x), slope(gate1, x[j].y)};
      of_amplitude[j] = float2{kLn2, kLn2} * log2_decay(j);  // the log-decay has the amplitude as a factor
    }
  } else {
    auto const bounded_at = [](ChannelGate const& gate, float x) {
      float const y = x + gate.bias, z = kLog2e * gate.amplitude * y;
      float const slope = gate.lower_bound * gate.amplitude * sigmoid_fast(z) * sigmoid_fast(-z);
      return float2{slope, slope * y};
    };
#pragma unroll
    for (int j = 0; j < kCount; ++j) set(j, bounded_at(gate0, x[j].x), bounded_at(gate1, x[j].y));
  }
}

}  // namespace kda
