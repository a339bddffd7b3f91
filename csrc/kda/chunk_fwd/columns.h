// A chunk in registers, by columns: each thread holds two neighbouring key channels of 16 consecutive tokens.
//
// Both kernels of the forward need the decays exp(sum of g from an anchor to a token). With a channel's tokens in one
// thread these are running products of exp(g_t) <= 1, taken from the anchor outwards: no exponent is ever positive,
// nothing is subtracted, and one exponential a token and channel is all there is (kda.md, section 4).
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
  const int64_t at = chunk.batch_row * p.beta_strides.batch + (chunk.begin + row) * p.beta_strides.token +
                     chunk.value_head * p.beta_strides.head;
  const float x = p.beta_is_fp32 ? static_cast<float const*>(p.beta)[at] : to_float(static_cast<E const*>(p.beta)[at]);
  if (!p.beta_sigmoid) return x;
  return (p.neg_eigval ? 2.f : 1.f) * sigmoid(x);
}

template <class Variant>
struct Columns {
  using E = typename Variant::Element;
  tile::Pair<E> q[kTokensPerThread], k[kTokensPerThread];
  float2 g[kTokensPerThread];  // as loaded; exp(log-decay) after `decay_from_gate`

  /// `group`, `pair`: which tokens and channels are this thread's.
  KDA_DEVICE void load(ChunkFwdParams const& p, ChunkOfHead const& chunk, int group, int pair) {
    const int64_t token0 = chunk.begin + group * kTokensPerThread;
    E const* q_row = row<E>(p.q, p.q_strides, chunk.batch_row, token0, chunk.head);
    E const* k_row = row<E>(p.k, p.k_strides, chunk.batch_row, token0, chunk.head);
    const int rows = chunk.rows - group * kTokensPerThread;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      const int count = j < rows ? p.key_dim : 0;
      q[j] = tile::load_pair<E>(q_row + j * p.q_strides.token, 2 * pair, count, p.q_pairs_aligned);
      k[j] = tile::load_pair<E>(k_row + j * p.k_strides.token, 2 * pair, count, p.k_pairs_aligned);
    }
    if (p.g_is_fp32) load_gate<float>(p, chunk, token0, rows, pair);
    else load_gate<E>(p, chunk, token0, rows, pair);
  }

  /// g <- exp(log-decay), the factor by which each token decays each channel; 1 for padding.
  KDA_DEVICE void decay_from_gate(ChunkFwdParams const& p, ChunkOfHead const& chunk, int group, int pair) {
    const ChannelGate gate0(p.gate, chunk.value_head, 2 * pair, p.key_dim);
    const ChannelGate gate1(p.gate, chunk.value_head, 2 * pair + 1, p.key_dim);
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      const bool live = group * kTokensPerThread + j < chunk.rows;
      g[j].x = live && 2 * pair < p.key_dim ? gate0.template decay<E>(g[j].x) : 1.f;
      g[j].y = live && 2 * pair + 1 < p.key_dim ? gate1.template decay<E>(g[j].y) : 1.f;
    }
  }

  /// The decay over all 16 tokens.
  KDA_DEVICE float2 total() const {
    float2 product{1.f, 1.f};
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) product = product * g[j];
    return product;
  }

 private:
  template <class T>
  static KDA_DEVICE T const* row(void const* base, TokenStrides const& s, int64_t b, int64_t token, int head) {
    return static_cast<T const*>(base) + b * s.batch + token * s.token + head * s.head;
  }
  template <class G>
  KDA_DEVICE void load_gate(ChunkFwdParams const& p, ChunkOfHead const& chunk, int64_t token0, int rows, int pair) {
    G const* g_row = row<G>(p.g, p.g_strides, chunk.batch_row, token0, chunk.value_head);
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      const int count = j < rows ? p.key_dim : 0;
      g[j] = tile::to_float2<G>(
          tile::load_pair<G>(g_row + j * p.g_strides.token, 2 * pair, count, p.g_pairs_aligned));
    }
  }
};

}  // namespace kda
