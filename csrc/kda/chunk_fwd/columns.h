// A chunk in registers, by columns: each thread holds two neighbouring key channels of 8 consecutive tokens.
//
// Every decay is exp of a sum of log-decays from an anchor outwards. With a channel's tokens in one thread such sums
// are running sums: nothing is subtracted, whatever the gate (kda.md, section 4).
#pragma once
#include "kda/chunk_fwd/config.h"
#include "kda/chunk_fwd/params.h"
#include "tile/pair.h"

namespace kda {

/// One chunk of one value head.
struct ChunkOfHead {
  int64_t batch_row;
  int64_t begin;  // first token in the batch row
  int32_t rows;   // tokens, at most C; the rest of the tile is padding: k = q = v = beta = 0, g = 0
  int32_t head, value_head;
};

/// The write strength of one token of the chunk.
template <class E>
KDA_DEVICE float load_beta(ChunkFwdParams const& p, ChunkOfHead const& chunk, int row) {
  int64_t const at = chunk.batch_row * p.beta_strides.batch + (chunk.begin + row) * p.beta_strides.token +
                     chunk.value_head * p.beta_strides.head;
  float const x = p.beta_is_fp32 ? static_cast<float const*>(p.beta)[at] : to_float(static_cast<E const*>(p.beta)[at]);
  if (!p.beta_sigmoid) return x;
  return (p.neg_eigval ? 2.f : 1.f) * sigmoid(x);
}

template <class Variant>
struct Columns {
  using E = typename Variant::Element;
  tile::Pair<E> q[kTokensPerThread], k[kTokensPerThread];
  float g0[kTokensPerThread], g1[kTokensPerThread];  // as loaded; log2 of the decay after `decay_from_gate`

  /// `group`, `pair`: which tokens and channels are this thread's. Padding is zero.
  KDA_DEVICE void load(ChunkFwdParams const& p, ChunkOfHead const& chunk, int group, int pair) {
    int64_t const token0 = chunk.begin + group * kTokensPerThread;
    int const rows = chunk.rows - group * kTokensPerThread;
    load_rows<E>(q, p.q, p.q_strides, p.q_pairs_aligned, chunk.batch_row, token0, chunk.head, rows, pair, p.key_dim);
    load_rows<E>(k, p.k, p.k_strides, p.k_pairs_aligned, chunk.batch_row, token0, chunk.head, rows, pair, p.key_dim);
    if (p.g_is_fp32) load_gate<float>(p, chunk, token0, rows, pair);
    else load_gate<E>(p, chunk, token0, rows, pair);
  }

  /// g <- log2 of the factor by which each token decays each channel; 0 for padding tokens. Channels beyond key_dim get
  /// some decay: their q, k and state are zero.
  KDA_DEVICE void decay_from_gate(ChunkFwdParams const& p, ChunkOfHead const& chunk, int group, int pair) {
    log2_decays<E>(g0, ChannelGate(p.gate, chunk.value_head, 2 * pair, p.key_dim));
    log2_decays<E>(g1, ChannelGate(p.gate, chunk.value_head, 2 * pair + 1, p.key_dim));
    int const rows = chunk.rows - group * kTokensPerThread;
    if (rows >= kTokensPerThread) return;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      if (j >= rows) g0[j] = g1[j] = 0.f;
  }

  KDA_DEVICE float2 log2_decay(int j) const { return {g0[j], g1[j]}; }
  /// g <- the decays themselves, for running products.
  KDA_DEVICE void exponentiate() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) g0[j] = decay_exp2<E>(g0[j]), g1[j] = decay_exp2<E>(g1[j]);
  }
  KDA_DEVICE float2 decay(int j) const { return {g0[j], g1[j]}; }

  /// log2 of the decay over all eight tokens.
  KDA_DEVICE float2 log2_total() const {
    float2 sum = log2_decay(0);
#pragma unroll
    for (int j = 1; j < kTokensPerThread; ++j) sum = sum + log2_decay(j);
    return sum;
  }

 private:
  /// One pair of channels of 8 tokens, `rows` of them live.
  template <class T>
  static KDA_DEVICE void load_rows(tile::Pair<T> (&x)[kTokensPerThread], void const* base, TokenStrides const& s,
                                   bool aligned, int64_t batch_row, int64_t token0, int head, int rows, int pair,
                                   int key_dim) {
    T const* row = static_cast<T const*>(base) + batch_row * s.batch + token0 * s.token + head * s.head + 2 * pair;
    bool const first = 2 * pair < key_dim, second = 2 * pair + 1 < key_dim;
    if (aligned && second && rows >= kTokensPerThread) {
#pragma unroll
      for (int j = 0; j < kTokensPerThread; ++j, row += s.token) x[j] = *reinterpret_cast<tile::Pair<T> const*>(row);
    } else {
#pragma unroll
      for (int j = 0; j < kTokensPerThread; ++j, row += s.token)
        x[j] =
            tile::to_pair<T>(first && j < rows ? to_float(row[0]) : 0.f, second && j < rows ? to_float(row[1]) : 0.f);
    }
  }
  template <class G>
  KDA_DEVICE void load_gate(ChunkFwdParams const& p, ChunkOfHead const& chunk, int64_t token0, int rows, int pair) {
    tile::Pair<G> x[kTokensPerThread];
    load_rows<G>(x, p.g, p.g_strides, p.g_pairs_aligned, chunk.batch_row, token0, chunk.value_head, rows, pair,
                 p.key_dim);
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const pair_of_g = tile::to_float2<G>(x[j]);
      g0[j] = pair_of_g.x, g1[j] = pair_of_g.y;
    }
  }
};

}  // namespace kda
