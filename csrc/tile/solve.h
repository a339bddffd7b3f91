// Solution of (I + L) X = R for a strictly lower triangular L by substitution (kda.md, section 4): in fp32 inside 16 x
// 16 diagonal blocks, by blocks above. Nothing is ever squared, so nothing can blow up on the way to an X that does
// not.
#pragma once
#include "tile/mma_tile.h"

namespace kda::tile {

/// Replaces the 16 x 16 diagonal block in the rows from `first` on of I + L by its inverse, unit diagonal and zeros
/// included. Lane `col` of sixteen owns the column `col`; `lanes` are the lanes of the warp that take part. Entries on
/// and above the diagonal do not count. Four rows at a time, and what they mean for the rows below.
template <class Tile>
KDA_DEVICE void invert_diagonal_block(Tile& diagonal, int first, int col, uint32_t lanes) {
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) x[r] = r == col ? 1.f : 0.f;
#pragma unroll
  for (int i = 0; i < 16; i += 4)
#pragma unroll
    for (int r = i + 1; r < 16; ++r) {
      float4 const row = *reinterpret_cast<float4 const*>(&diagonal.at(first + r, i));
      float const four[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int n = 0; n < 4 && i + n < r; ++n) x[r] -= four[n] * x[i + n];
    }
  sync_warp(lanes);
#pragma unroll
  for (int r = 0; r < 16; ++r) diagonal.at(first + r, col) = x[r];
}

/// Sixteen columns of X, transposed: x[i] holds the transpose of block i of R, then of X. One warp.
///     X_i = D_i (R_i - sum_{j < i} L_ij X_j)
/// `below`: the blocks L_ij, in E; `diagonal`: the D_i, one below the other, whose products are taken in `Diagonal`.
template <class E, class Diagonal, int kBlocks, class Below, class DiagonalTile>
KDA_DEVICE void substitute(Accumulator (&x)[kBlocks][2], Below const& below, DiagonalTile const& diagonal) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    if (i > 0) {
      Accumulator sum[2] = {};
#pragma unroll
      for (int j = 0; j < i; ++j)
        multiply<E>(sum[0], sum[1], left_from<E>(x[j][0], x[j][1]), load_right<E>(below, i * 16, j * 16));
#pragma unroll
      for (int e = 0; e < 8; ++e) x[i][e / 4].x[e % 4] -= sum[e / 4].x[e % 4];
    }
    auto const left = left_from<Diagonal>(x[i][0], x[i][1]);
    x[i][0] = x[i][1] = Accumulator{};
    multiply<Diagonal>(x[i][0], x[i][1], left, load_right<Diagonal>(diagonal, i * 16, 0));
  }
}

}  // namespace kda::tile
