// Solution of (I + L) X = R for a strictly lower triangular L by substitution (docs/mathematics.md, section 4): in fp32
// inside 16 x 16 diagonal blocks, by blocks above. Nothing is ever squared, so nothing can blow up on the way to an X
// that does not.
#pragma once
#include "tile/mma_tile.h"

namespace kda::tile {

/// A 16 x 16 block of fp32, first by rows, then, inverted, as the right operand that each lane of a product takes.
struct alignas(16) DiagonalBlock {
  float x[16 * 16];

  KDA_DEVICE float& at(int row, int col) { return x[row * 16 + col]; }
  /// Element (n, depth) of the operand: registers 4 (n / 8) ... of a lane are neighbours (mma_tile.h, load_right).
  static KDA_DEVICE constexpr int operand(int n, int depth) {
    return n / 8 * 128 + n % 8 * 16 + depth % 8 / 2 * 4 + depth / 8 * 2 + depth % 2;
  }
  /// As store_operand left it for the same E.
  template <class E>
  KDA_DEVICE RightFragment<E> load_operand(int lane) const {
    RightFragment<E> f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 const four = *reinterpret_cast<float4 const*>(&x[half * 128 + lane * 4]);
      float const values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<E, Tf32>) f.hi[half * 4 + i] = float_to_bits(values[i]);
        else split<E>(f, half * 4 + i, values[i]);
      }
    }
    return f;
  }
  /// The operand of the transpose.
  template <class E>
  KDA_DEVICE RightFragment<E> load_operand_transposed(int lane) const {
    RightFragment<E> f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float const value = x[operand(i / 2 % 2 * 8 + lane % 4 * 2 + i % 2, i / 4 * 8 + lane / 4)];
      if constexpr (std::is_same_v<E, Tf32>) f.hi[i] = float_to_bits(value);
      else split<E>(f, i, value);
    }
    return f;
  }
  /// A column; for Tf32 rounded here, once for all products.
  template <class E>
  KDA_DEVICE void store_operand(int col, float const (&column)[16]) {
    float* const to = &x[operand(0, col)];
#pragma unroll
    for (int r = 0; r < 16; ++r)
      to[operand(r, 0)] = std::is_same_v<E, Tf32> ? bits_to_float(float_for_tf32(column[r])) : column[r];
  }
};

/// Replaces a diagonal block of I + L by its inverse, unit diagonal and zeros included, as an operand. Lane `col` of
/// sixteen owns the column `col`; `lanes` are the lanes of the warp that take part. Entries on and above the diagonal
/// do not count. Four rows at a time, and what they mean for the rows below.
template <class Diagonal>
KDA_DEVICE void invert_diagonal_block(DiagonalBlock& block, int col, uint32_t lanes) {
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) x[r] = r == col ? 1.f : 0.f;
#pragma unroll
  for (int i = 0; i < 16; i += 4)
#pragma unroll
    for (int r = i + 1; r < 16; ++r) {
      float4 const row = *reinterpret_cast<float4 const*>(&block.at(r, i));
      float const four[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int n = 0; n < 4 && i + n < r; ++n) x[r] -= four[n] * x[i + n];
    }
  sync_warp(lanes);
  block.store_operand<Diagonal>(col, x);
}

/// Sixteen columns of X, transposed: x[i] holds the transpose of block i of R, then of X. One warp.
///     X_i = D_i (R_i - sum_{j < i} L_ij X_j)
/// `below`: the blocks L_ij, in E; `diagonal`: the D_i, whose products are taken in `Diagonal`.
template <class E, class Diagonal, int kBlocks, class Below>
KDA_DEVICE void substitute(Accumulator (&x)[kBlocks][2], Below const& below, DiagonalBlock const (&diagonal)[kBlocks]) {
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
    multiply<Diagonal>(x[i][0], x[i][1], left, diagonal[i].template load_operand<Diagonal>(lane_index()));
  }
}

/// The same for the transpose of I + L, from the last block to the first.
///     X_i = D_i^T (R_i - sum_{j > i} L_ji^T X_j)
template <class E, class Diagonal, int kBlocks, class Below>
KDA_DEVICE void substitute_transposed(Accumulator (&x)[kBlocks][2], Below const& below,
                                      DiagonalBlock const (&diagonal)[kBlocks]) {
#pragma unroll
  for (int i = kBlocks - 1; i >= 0; --i) {
    if (i < kBlocks - 1) {
      Accumulator sum[2] = {};
#pragma unroll
      for (int j = i + 1; j < kBlocks; ++j)
        multiply<E>(sum[0], sum[1], left_from<E>(x[j][0], x[j][1]), load_right_transposed<E>(below, j * 16, i * 16));
#pragma unroll
      for (int e = 0; e < 8; ++e) x[i][e / 4].x[e % 4] -= sum[e / 4].x[e % 4];
    }
    auto const left = left_from<Diagonal>(x[i][0], x[i][1]);
    x[i][0] = x[i][1] = Accumulator{};
    multiply<Diagonal>(x[i][0], x[i][1], left, diagonal[i].template load_operand_transposed<Diagonal>(lane_index()));
  }
}

}  // namespace kda::tile
