// Inverse of a unit lower triangular matrix by substitution (kda.md, section 4): forward substitution in fp32 inside
// 16 x 16 diagonal blocks, block substitution above. Nothing is ever squared, so nothing can blow up on the way to an
// inverse whose own entries are bounded.
#pragma once
#include "tile/mma_tile.h"

namespace kda::tile {

/// Replaces the 16 x 16 diagonal block at (first, first) of I + l by its inverse, unit diagonal and zeros included.
/// Lane `col` of sixteen owns the column `col`; `lanes` are the lanes of the warp that take part. Entries of `l` on and
/// above the diagonal do not count.
template <class Tile>
KDA_DEVICE void invert_diagonal_block(Tile& l, int first, int col, uint32_t lanes) {
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) {
    float sum[4] = {r == col ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < r; i += 4) {
      float4 const row = *reinterpret_cast<float4 const*>(&l.at(first + r, first + i));
      float const four[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int n = 0; n < 4 && i + n < r; ++n) sum[n] -= four[n] * x[i + n];
    }
    x[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  sync_warp(lanes);
#pragma unroll
  for (int r = 0; r < 16; ++r) l.at(first + r, first + col) = x[r];
}

/// One block column of (I + l)^-1, transposed, in registers: x[i] holds the transpose of block (i, column) as two
/// accumulators (rows: the block's columns). `l` has its diagonal blocks inverted already. One warp.
///     X_cc = D_c,   X_ic = -D_i sum_{c <= k < i} L_ik X_kc
template <class E, int kBlocks, class Tile>
KDA_DEVICE void invert_block_column(Accumulator (&x)[kBlocks][2], Tile const& l, int column) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    x[i][0] = x[i][1] = Accumulator{};
    if (i == column) load_transposed<E>(x[i][0], x[i][1], l, i * 16, i * 16);
    if (i <= column) continue;
    Accumulator sum[2] = {};
#pragma unroll
    for (int k = 0; k < i; ++k) {
      if (k < column) continue;
      multiply<E>(sum[0], sum[1], left_from<E>(x[k][0], x[k][1]), load_right<E>(l, i * 16, k * 16));
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[0].x[e] = -sum[0].x[e], sum[1].x[e] = -sum[1].x[e];
    multiply<E>(x[i][0], x[i][1], left_from<E>(sum[0], sum[1]), load_right<E>(l, i * 16, i * 16));
  }
}

}  // namespace kda::tile
