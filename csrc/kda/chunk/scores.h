// A_kk and A_qk of one chunk, and what else its decays are needed for: Gamma.Q, Gamma.K, K~ and Gamma_C.
//
//     A[r, i] = sum_d x_r exp(G_r - G_i) k_i      for i <= r; tensor cores need exp(G_r - a) exp(a - G_i)
//
// Two ways. BlockScores: one anchor a for each block of 16 tokens, in its middle. It needs the decay over any eight
// tokens to stay within what the element type can hold on both sides of 1, which almost every gate does (any with
// lower_bound >= -5). SplitScores: for the others, whatever they are.
#pragma once
#include "kda/chunk/prepare_storage.h"
#include "tile/mma_tile.h"

namespace kda {

/// Keys may be collinear: all scores of a chunk then are off the same way, and nothing averages their errors out.
inline constexpr tile::Sum kSum = tile::Sum::kRounded;

/// f(j, log2 e) for each of the thread's tokens, from the anchor of its block outwards, with e = exp(G - a).
template <class Thread, class F>
KDA_DEVICE void for_each_from_anchor(Thread const& c, F f) {
  float2 sum{0.f, 0.f};
  if (c.group % 2 == 0) {  // before the anchor
#pragma unroll
    for (int j = kTokensPerThread - 1; j >= 0; --j) {
      f(j, sum);
      sum = sum + Thread::both(-1.f) * c.columns.log2_decay(j);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      sum = sum + c.columns.log2_decay(j);
      f(j, sum);
    }
  }
}

template <class Thread>
struct BlockScores {
  using E = typename Thread::E;
  static constexpr int kBlocks = Thread::kBlocks, kKeyTile = Thread::Shape::kKeyTile;
  Thread& c;

  /// This thread's channels, token by token from the anchor outwards. With e = exp(G - a):
  /// q e, k e, k / e for the products; Gamma.q, Gamma.k and K~ are these times a decay up to or from the anchor.
  KDA_DEVICE void write() {
    int const block = c.group / 2, anchor = 2 * block + 1;  // in groups of eight tokens
    float2 const to_anchor = Thread::exp2(c.log2_groups(0, anchor));
    float2 const to_end = Thread::exp2(c.log2_groups(anchor, Thread::kGroups));
    if (c.group < anchor) {
      write_factors(block);
      if (block == 0) *reinterpret_cast<float2*>(&c.out.record().gamma_c[2 * c.pair]) = to_anchor * to_end;
    }
    for_each_from_anchor(c, [&](int j, float2 log2_e) { write_token(j, log2_e, to_anchor, to_end); });
  }

  /// Rows of block i meet columns of block j <= i at the anchor of j. A warp has q or k of a block below the diagonal,
  /// or both on the diagonal, where it goes on to the inverse.
  KDA_DEVICE void multiply() {
    constexpr int kBelow = kBlocks * (kBlocks - 1);
    for (int unit = c.warp; unit < kBelow + kBlocks; unit += Thread::kWarps) {
      tile::Accumulator acc[2] = {};
      if (unit < kBelow) {
        int j = unit / 2, i = 1;
        while (j >= i) j -= i++;  // row by row
        multiply_block<true>(acc, unit % 2 ? c.s.blocks.q : c.s.blocks.k, i, j);
        if (unit % 2) store_queries(i, j, acc);
        else store_keys<false>(i, j, acc);
      } else {
        int const i = unit - kBelow;
        multiply_block<false>(acc, c.s.blocks.k, i, i);
        store_keys<true>(i, i, acc);
        acc[0] = acc[1] = tile::Accumulator{};
        multiply_block<false>(acc, c.s.blocks.q, i, i);
        store_queries(i, i, acc);
        sync_warp();
        if (c.lane < kTokensPerBlock)
          tile::invert_diagonal_block<typename Thread::DiagonalElement>(c.s.diagonal[i], c.lane, 0xffffu);
      }
    }
  }

 private:
  /// The decay from the anchor of every earlier block to that of this one.
  KDA_DEVICE void write_factors(int block) {
    float2 sum = c.s.log2_total[2 * block][c.pair];
#pragma unroll
    for (int n = kBlocks - 2; n >= 0; --n) {
      if (n >= block) continue;
      sum = sum + c.s.log2_total[2 * n + 1][c.pair];
      float2 const decay = Thread::exp2(sum);
      c.s.factor[block * (block - 1) / 2 + n][c.pair] = tile::to_pair<E>(decay.x, decay.y);
      sum = sum + c.s.log2_total[2 * n][c.pair];
    }
  }
  KDA_DEVICE void write_token(int j, float2 log2_e, float2 to_anchor, float2 to_end) {
    float2 const e = Thread::exp2(log2_e), inverse = Thread::exp2(Thread::both(-1.f) * log2_e);
    float2 const k = c.k(j, c.raw_k(j)), q_row = c.q(j, c.raw_q(j)) * e, k_row = k * e, k_column = k * inverse;
    int const row = c.row(j);
    c.store(c.s.blocks.q, row, q_row);
    c.store(c.s.blocks.k, row, k_row);
    c.store(c.s.blocks.k_inverse, row, k_column);
    c.store(c.s.gamma_k, row, k_row * to_anchor);
    c.store(c.out.record().gamma_q, row, q_row * (to_anchor * Thread::both(c.p.scale)));
    c.store(c.out.record().k_tilde, row, k_column * to_end);
  }
  template <bool kScaled>
  KDA_DEVICE void multiply_block(tile::Accumulator (&acc)[2], typename Thread::Storage::Wide const& rows, int i,
                                 int j) const {
    auto const* factor = c.s.factor[i * (i - 1) / 2 + j];
#pragma unroll
    for (int d = 0; d < kKeyTile; d += 16) {
      tile::LeftFragment<E> left;
      if constexpr (kScaled) left = tile::load_left_scaled<E>(rows, i * 16, d, factor);
      else left = tile::load_left<E>(rows, i * 16, d);
      tile::multiply<E, kSum>(acc[0], acc[1], left, tile::load_right<E>(c.s.blocks.k_inverse, j * 16, d));
    }
  }
  /// f(row and column inside the block, two neighbouring scores).
  template <class F>
  KDA_DEVICE void for_scores(tile::Accumulator const (&acc)[2], F f) const {
#pragma unroll
    for (int e = 0; e < 8; e += 2)
      f(c.lane / 4 + e / 2 % 2 * 8, e / 4 * 8 + c.lane % 4 * 2, acc[e / 4].x[e % 4], acc[e / 4].x[e % 4 + 1]);
  }
  KDA_DEVICE void store_queries(int i, int j, tile::Accumulator const (&acc)[2]) {
    for_scores(acc, [&](int r, int n, float x, float y) {
      bool const first = i > j || n <= r, second = i > j || n < r;
      tile::store_pair<E>(&c.s.a_qk.at(i * 16 + r, j * 16 ^ n),
                          tile::to_pair<E>(first ? c.p.scale * x : 0.f, second ? c.p.scale * y : 0.f));
    });
  }
  template <bool kDiagonal>
  KDA_DEVICE void store_keys(int i, int j, tile::Accumulator const (&acc)[2]) {
    for_scores(acc, [&](int r, int n, float x, float y) {
      float const beta = c.s.beta[i * 16 + r];
      if constexpr (kDiagonal) *reinterpret_cast<float2*>(&c.s.diagonal[i].at(r, n)) = {beta * x, beta * y};
      else tile::store_pair<E>(&c.s.l.at(i * 16 + r, j * 16 ^ n), tile::to_pair<E>(beta * x, beta * y));
    });
  }
};

/// Splits of the chunk, halves first, down to single tokens; at the split [lo, m, hi) every row r >= m and column i < m
/// meet at the anchor m, with two running products of exp(g) <= 1: no overflow, and underflow only where the truth is
/// that small. The diagonal has no decay and is a plain dot product.
template <class Thread>
struct SplitScores {
  using E = typename Thread::E;
  using Split = typename Thread::Storage::Split;
  static constexpr int kChunk = Thread::kChunk, kBlocks = Thread::kBlocks, kGroups = Thread::kGroups;
  static constexpr int kKeyTile = Thread::Shape::kKeyTile;
  Thread& c;
  tile::Pair<E> raw_q[kTokensPerThread], raw_k[kTokensPerThread];

  KDA_DEVICE void write() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) raw_q[j] = c.raw_q(j), raw_k[j] = c.raw_k(j);
    c.columns.exponentiate();
    float2 before = Thread::exp2(c.log2_groups(0, c.group)), after = Thread::exp2(c.log2_groups(c.group + 1, kGroups));
    if (c.group == 0) {
      float2 const gamma_c = Thread::exp2(c.log2_groups(0, kGroups));
      *reinterpret_cast<float2*>(&c.out.record().gamma_c[2 * c.pair]) = gamma_c;
    }
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      before = before * c.columns.decay(j);
      c.store(c.out.record().gamma_q, c.row(j), q(j) * before * Thread::both(c.p.scale));
      c.store(c.s.gamma_k, c.row(j), k(j) * before);
    }
#pragma unroll
    for (int j = kTokensPerThread - 1; j >= 0; --j) {
      c.store(c.out.record().k_tilde, c.row(j), k(j) * after);
      after = after * c.columns.decay(j);
    }
    float dots[kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const product = q(j) * k(j);
      dots[j] = product.x + product.y;
    }
    float const sum = warp_sum_scattered(dots);
    if (c.lane < kTokensPerThread) c.s.dots[c.warp % Thread::Shape::kWarpsPerGroup][c.row(c.lane)] = sum;
  }

  KDA_DEVICE void multiply() {
    if (c.thread < kChunk) {
      float dot = 0.f;
#pragma unroll
      for (auto const& partial : c.s.dots) dot += partial[c.thread];
      c.s.a_qk.at(c.thread, c.thread) = from_float<E>(c.p.scale * dot);
    }
    level<kChunk / 2>();
    c.sync_team();
    if (c.thread < kChunk)
      tile::invert_diagonal_block<typename Thread::DiagonalElement>(
          c.s.diagonal[c.thread / kTokensPerBlock], c.thread % kTokensPerBlock, kChunk == 16 ? 0xffffu : ~0u);
  }

 private:
  KDA_DEVICE float2 q(int j) const { return c.q(j, raw_q[j]); }
  KDA_DEVICE float2 k(int j) const { return c.k(j, raw_k[j]); }

  template <int kHalf>
  KDA_DEVICE void level() {
    if constexpr (kHalf >= 1) {
      auto& split = c.s.split[kHalf == 32 || kHalf == 8 || kHalf == 2];
      write_split<kHalf>(split);
      c.sync_team();
      multiply_split<kHalf>(split);
      level<kHalf / 2>();
    }
  }

  /// The decay between this group's tokens and the anchor, over the groups between.
  template <int kHalf>
  KDA_DEVICE float2 groups_to_anchor(bool upper) const {
    constexpr int kGroupsOfHalf = kHalf > kTokensPerThread ? kHalf / kTokensPerThread : 1;
    if constexpr (kGroupsOfHalf == 1) return {1.f, 1.f};
    int const first_of_half = c.group / kGroupsOfHalf * kGroupsOfHalf;
    return Thread::exp2(upper ? c.log2_groups(first_of_half, c.group)
                              : c.log2_groups(c.group + 1, first_of_half + kGroupsOfHalf));
  }

  /// The tokens [first, first + count) of this thread's eight, all on one side of their split.
  template <int kHalf>
  KDA_DEVICE void write_side(Split& split, bool upper, int first, int count) {
    int const token0 = c.row(first), block = token0 / (2 * kHalf), in_half = token0 % kHalf;
    float2 decay = groups_to_anchor<kHalf>(upper);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      int const j = upper ? n : count - 1 - n;  // outwards from the anchor
      if (upper) {
        decay = decay * c.columns.decay(first + j);
        int const row = block * 2 * kHalf + in_half + j;
        c.store(split.rows, row, q(first + j) * decay);
        c.store(split.rows, row + kHalf, k(first + j) * decay);
      } else {
        c.store(split.cols, block * kHalf + in_half + j, k(first + j) * decay);
        decay = decay * c.columns.decay(first + j);
      }
    }
  }
  template <int kHalf>
  KDA_DEVICE void write_split(Split& split) {
    if constexpr (kHalf >= kTokensPerThread) {
      if (c.row(0) & kHalf) write_side<kHalf>(split, true, 0, kTokensPerThread);  // constants: registers have no index
      else write_side<kHalf>(split, false, 0, kTokensPerThread);
    } else {
#pragma unroll
      for (int first = 0; first < kTokensPerThread; first += 2 * kHalf) {
        write_side<kHalf>(split, false, first, kHalf);
        write_side<kHalf>(split, true, first + kHalf, kHalf);
      }
    }
  }

  /// Rows of 16 (m) against columns of 16 (n) of the splits of one level; below 16 only a diagonal of 16 x 8 counts.
  template <int kHalf>
  KDA_DEVICE void multiply_split(Split const& split) {
    constexpr int kAcross = kHalf >= 16 ? kHalf / 16 : 1;
    for (int unit = c.warp; unit < kBlocks * kAcross; unit += Thread::kWarps) {
      int const m = unit / kAcross;
      int const n = kHalf >= 16 ? m * 16 / (2 * kHalf) * kHalf + unit % kAcross * 16 : m / 2 * 16;
      tile::Accumulator acc[2] = {};
      if constexpr (kHalf >= 16) {
#pragma unroll
        for (int d = 0; d < kKeyTile; d += 16)
          tile::multiply<E, kSum>(acc[0], acc[1], tile::load_left<E>(split.rows, m * 16, d),
                                  tile::load_right<E>(split.cols, n, d));
        store_scores<kHalf>(acc[0], m * 16, n);
        store_scores<kHalf>(acc[1], m * 16, n + 8);
      } else {
#pragma unroll
        for (int d = 0; d < kKeyTile; d += 16)
          tile::multiply_half<E, kSum>(acc[0], tile::load_left<E>(split.rows, m * 16, d),
                                       tile::load_right<E>(split.cols, n, d), m % 2 == 1);
        store_scores<kHalf>(acc[0], m * 16, n + m % 2 * 8);
      }
    }
  }
  template <int kHalf>
  KDA_DEVICE void store_scores(tile::Accumulator const& acc, int row0, int col0) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const row = row0 + c.lane / 4 + e / 2 * 8, col = col0 + c.lane % 4 * 2 + e % 2;
      int const block = row / (2 * kHalf);
      if (block != col / kHalf) continue;
      int const r = block * 2 * kHalf + kHalf + row % kHalf, i = block * 2 * kHalf + col % kHalf;
      float const beta_a = c.s.beta[r] * acc.x[e];
      if (row % (2 * kHalf) < kHalf) c.s.a_qk.at(r, i) = from_float<E>(c.p.scale * acc.x[e]);
      else if (kHalf >= kTokensPerBlock) c.s.l.at(r, i) = from_float<E>(beta_a);
      else c.s.diagonal[r / kTokensPerBlock].at(r % kTokensPerBlock, i % kTokensPerBlock) = beta_a;
    }
  }
};

}  // namespace kda
