// The mathematics of one row, which the kernels for short and for long rows share.
#pragma once
#include "kda/elements.h"
#include "kda/gated_rmsnorm/params.h"
#include "platform/platform.h"

namespace kda {

/// The normalised row is x * down * rstd. `down` is a power of two, and 1 unless squares could leave the range of fp32.
struct RowScale {
  float down, rstd;

  KDA_DEVICE float normalised(float x) const { return x * down * rstd; }
  /// From the gradient of the normalised row to that of x.
  KDA_DEVICE float of_gradient() const { return rstd * down; }
};

/// Whether a sum of squares of x tells too little: it may have overflowed, or underflowed beside a tiny eps.
KDA_DEVICE bool is_extreme(float squares, float eps) {
  return squares > 0x1p100f || (squares < 0x1p-100f && eps < 0x1p-80f);
}

/// The power of two that brings the larger of `largest` and sqrt(eps) near 1.
KDA_DEVICE float down_scale(float largest, float eps) {
  uint32_t const exponent = float_to_bits(fmaxf(largest, sqrtf(eps))) >> 23;
  uint32_t const clamped = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return bits_to_float((254 - clamped) << 23);
}

/// `squares`: the sum over the row of (x * down)^2.
KDA_DEVICE RowScale row_scale(GatedRmsNormParams const& p, float squares, float down) {
  return {down, rsqrt_accurate(squares * p.per_dim + p.eps * down * down)};
}

/// One element of the backward, before the sum over the row.
struct NormGradient {
  float n;        // normalised
  float dn;       // its gradient through y
  float dgate;    // the gradient of the gate
  float dweight;  // this row's term of the gradient of the weight
  float share;    // this element's term of mean(n dn)

  /// What nobody asks for has no gradient, whatever it holds: padding may be NaN.
  template <class E>
  KDA_DEVICE static NormGradient of(GatedRmsNormParams const& p, float n, float gate, float dy, float weight, E) {
    bool const asked = dy != 0.f;
    float const known = asked ? n : 0.f;
    float2 const open = gate_activation<E>(p.activation, asked ? gate : 0.f);
    float const dn = dy * weight * open.x, through = dy * known;
    return {n, dn, through * weight * open.y, through * open.x, dn * (known * p.per_dim)};
  }
  /// `mean`: of n dn over the row.
  KDA_DEVICE float dx(float scale, float mean) const {
    return dn == 0.f && mean == 0.f ? 0.f : (dn - n * mean) * scale;
  }
};

}  // namespace kda
