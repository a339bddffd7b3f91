// The sigmoid and SiLU around the operation, and their derivatives: finite and relatively accurate for every x.
#pragma once
#include "platform/math.h"

namespace kda {

/// sigmoid(x) and sigmoid(-x), as precisely as elements E can use. 1 - sigmoid(x) would cancel, e^-x overflow.
template <class E>
KDA_DEVICE float2 sigmoids(float x) {
  constexpr bool kAccurate = sizeof(E) == 4;
  constexpr float kLog2e = 1.4426950408889634f;
  float const e = kAccurate ? exp_accurate(-fabsf(x)) : exp2_fast(-kLog2e * fabsf(x));
  float const upper = kAccurate ? 1.f / (1.f + e) : reciprocal_fast(1.f + e), lower = e * upper;
  return x > 0.f ? float2{upper, lower} : float2{lower, upper};
}

enum class Activation : int32_t { kNone, kSigmoid, kSilu };

/// f(x), and f'(x).
template <class E>
KDA_DEVICE float2 activation(Activation f, float x) {
  if (f == Activation::kNone) return {x, 1.f};
  float2 const s = sigmoids<E>(x);
  if (f == Activation::kSigmoid) return {s.x, s.x * s.y};
  return {x * s.x, s.x * fmaf(x, s.y, 1.f)};
}

}  // namespace kda
