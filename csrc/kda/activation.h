// The sigmoid and SiLU around the operation, and their derivatives: finite and relatively accurate for every x.
#pragma once
#include "platform/math.h"

namespace kda {

/// sigmoid(x) and sigmoid(-x), as precisely as elements E can use. 1 - sigmoid(x) would cancel, and e^-x may overflow:
/// where it does, sigmoid(x) is zero in elements of 16 bits, and what is said of sigmoid(-x) is not used.
template <class E>
KDA_DEVICE float2 sigmoids(float x) {
  constexpr float kLog2e = 1.4426950408889634f;
  if constexpr (sizeof(E) == 4) {
    float const e = exp_accurate(-fabsf(x)), upper = 1.f / (1.f + e), lower = e * upper;
    return x > 0.f ? float2{upper, lower} : float2{lower, upper};
  } else {
    float const e = exp2_fast(-kLog2e * x), s = reciprocal_fast(1.f + e);
    return {s, fminf(e, 0x1p127f) * s};
  }
}

enum class Activation : int32_t { kNone, kSigmoid, kSilu };

/// f(x), and f'(x), where f is a sigmoid or a SiLU: without a branch.
template <class E>
KDA_DEVICE float2 gate_activation(Activation f, float x) {
  bool const is_silu = f == Activation::kSilu;
  float const factor = is_silu ? x : 1.f, rest = is_silu ? 1.f : 0.f;
  float2 const s = sigmoids<E>(x);
  return {factor * s.x, s.x * fmaf(factor, s.y, rest)};
}
template <class E>
KDA_DEVICE float2 silu(float x) {
  return gate_activation<E>(Activation::kSilu, x);
}

}  // namespace kda
