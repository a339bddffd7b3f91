// The gate: from what the layer projects to the log-decay g <= 0 of each key channel (kda.md, section 1).
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

  KDA_DEVICE float log_decay(float x) const {
    switch (kind) {
      case GateKind::kSoftplus: return -amplitude * softplus(x + bias);
      case GateKind::kBounded: return lower_bound * sigmoid(amplitude * (x + bias));
      default: return x;
    }
  }

  /// d log_decay / dx, and d log_decay / dA_log (the amplitude's own derivative included).
  KDA_DEVICE float2 derivatives(float x) const {
    const float y = x + bias;
    if (kind == GateKind::kSoftplus) return {-amplitude * sigmoid(y), -amplitude * softplus(y)};
    const float s = sigmoid(amplitude * y), slope = lower_bound * s * (1.f - s) * amplitude;
    return {slope, slope * y};
  }

  /// exp(log_decay), with the special function unit where the element type is coarser than fp32.
  template <class E>
  KDA_DEVICE float decay(float x) const {
    const float g = log_decay(x);
    return sizeof(E) == 4 ? exp_accurate(g) : exp2_fast(1.44269504f * g);
  }
};

}  // namespace kda
