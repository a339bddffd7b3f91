// Rows of any length and alignment: a warp goes through a row element by element, as often as it needs to.
#pragma once
#include "kda/gated_rmsnorm/kernel.h"

namespace kda {

inline constexpr int kNormWarps = kNormThreads / 32;

template <class E>
KDA_DEVICE RowScale wide_scale(GatedRmsNormParams const& p, E const* x) {
  float squares = 0.f, largest = 0.f, down = 1.f;
  for (int c = lane_index(); c < p.dim; c += 32) {
    float const v = to_float(x[c]);
    squares = fmaf(v, v, squares), largest = fmaxf(largest, fabsf(v));
  }
  squares = warp_sum(squares);
  if (is_extreme(squares, p.eps)) {  // all lanes have the same bits
#pragma unroll
    for (int bits = 16; bits; bits /= 2) largest = fmaxf(largest, shuffle_xor(largest, bits));
    down = down_scale(largest, p.eps), squares = 0.f;
    for (int c = lane_index(); c < p.dim; c += 32) {
      float const v = to_float(x[c]) * down;
      squares = fmaf(v, v, squares);
    }
    squares = warp_sum(squares);
  }
  return row_scale(p, squares, down);
}

template <class E>
KDA_GLOBAL void __launch_bounds__(kNormThreads) gated_rmsnorm_fwd_wide_kernel(GatedRmsNormParams const p) {
  int64_t const row = int64_t(blockIdx.x) * kNormWarps + warp_index();
  if (row >= p.outer * p.heads) return;
  E* const element = nullptr;
  RowPlace const place(p, row);
  E const *const x = place.of(p.x, element), *const gate = place.of(p.gate, element);
  E* const y = place.of(p.y, element);
  RowScale const scale = wide_scale(p, x);
  for (int c = lane_index(); c < p.dim; c += 32) {
    float const weight = load_float(p.weight, p.weight_dtype, c);
    float const open = gate_activation<E>(p.activation, to_float(gate[c])).x;
    y[c] = from_float<E>(scale.normalised(to_float(x[c])) * weight * open);
  }
}

/// A warp per run of rows.
template <class E>
KDA_GLOBAL void __launch_bounds__(kNormThreads) gated_rmsnorm_bwd_wide_kernel(GatedRmsNormParams const p) {
  int64_t const rows = p.outer * p.heads, run = int64_t(blockIdx.x) * kNormWarps + warp_index();
  if (run >= p.runs) return;
  E* const element = nullptr;
  float* const dweight = p.partial + run * p.dim;
  for (int c = lane_index(); c < p.dim; c += 32) dweight[c] = 0.f;
  for (int64_t row = rows * run / p.runs; row < rows * (run + 1) / p.runs; ++row) {
    RowPlace const place(p, row);
    E const *const x = place.of(p.x, element), *const gate = place.of(p.gate, element),
                   *const dy = place.of(p.y, element);
    E *const dx = place.of(p.dx, element), *const dgate = place.of(p.dgate, element);
    RowScale const scale = wide_scale(p, x);
    auto const gradient = [&](int c) {
      return NormGradient::of(p, scale.normalised(to_float(x[c])), to_float(gate[c]), to_float(dy[c]),
                              load_float(p.weight, p.weight_dtype, c), E{});
    };
    float mean = 0.f;
    for (int c = lane_index(); c < p.dim; c += 32) mean += gradient(c).share;
    mean = warp_sum(mean);
    for (int c = lane_index(); c < p.dim; c += 32) {
      NormGradient const d = gradient(c);
      dx[c] = from_float<E>(d.dx(scale.of_gradient(), mean)), dgate[c] = from_float<E>(d.dgate);
      dweight[c] += d.dweight;
    }
  }
}

}  // namespace kda
