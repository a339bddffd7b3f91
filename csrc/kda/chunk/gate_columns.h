// The gate of a chunk in registers, by columns: each thread holds two neighbouring key channels of 8 consecutive
// tokens.
//
// Every decay is exp of a sum of log-decays from an anchor outwards. With a channel's tokens in one thread such sums
// are running sums: nothing is subtracted, whatever the gate (docs/mathematics.md, section 4).
#pragma once
#include "kda/chunk/inputs.h"
#include "kda/chunk/shape.h"
#include "tile/pair.h"

namespace kda {

/// One chunk of one value head.
struct ChunkOfHead {
  int64_t batch_row;
  int64_t begin;  // first token in the batch row
  int32_t rows;   // tokens, at most C; the rest of the tile is padding: k = q = v = beta = 0, g = 0
  int32_t head, value_head;
};

/// beta of one token of the chunk, as given.
template <class E>
KDA_DEVICE float load_beta(ChunkInputs const& p, ChunkOfHead const& chunk, int row) {
  RowStrides const& s = p.beta.strides;
  int64_t const at = chunk.batch_row * s.batch + (chunk.begin + row) * s.token + chunk.value_head * s.head;
  return p.beta.is_fp32 ? static_cast<float const*>(p.beta.data)[at] : to_float(static_cast<E const*>(p.beta.data)[at]);
}
KDA_DEVICE float write_strength(ChunkInputs const& p, float beta) {
  if (!p.beta_sigmoid) return beta;
  return (p.neg_eigval ? 2.f : 1.f) * sigmoid(beta);
}

/// The backward divides U by beta. A smaller beta counts as this one in its records; what follows from them takes U
/// times beta_share.
template <class E>
inline constexpr float kLeastBeta = std::is_same_v<E, Fp16> ? 0x1p-14f : 0x1p-60f;
template <class E>
KDA_DEVICE float at_least(float beta) {  // nan stays nan
  return fabsf(beta) < kLeastBeta<E> ? copysignf(kLeastBeta<E>, beta) : beta;
}
template <class E>
KDA_DEVICE float beta_share(float beta) {
  return beta / at_least<E>(beta);
}

/// The plan with a chunk that the compiler knows.
template <class Variant>
KDA_DEVICE ChunkPlan plan_of(ChunkInputs const& p) {
  ChunkPlan plan = p.plan;
  plan.chunk = Variant::config.chunk;
  return plan;
}

/// Chunk `i` of a sequence, for one value head.
template <class Variant>
KDA_DEVICE ChunkOfHead chunk_of_head(ChunkInputs const& p, Sequence const& sequence, int64_t i, int value_head) {
  constexpr int kChunk = Variant::config.chunk;
  int64_t const first = i * kChunk, remaining = sequence.length - first;
  return {sequence.batch_row, sequence.begin + first, int32_t(remaining < kChunk ? remaining : kChunk),
          value_head / (p.value_heads / p.heads), value_head};
}

/// The chunk in a cell of the plan. False: there is none.
template <class Variant>
KDA_DEVICE bool chunk_in_cell(ChunkOfHead& chunk, ChunkInputs const& p, int64_t cell, int value_head) {
  ChunkPlan const plan = plan_of<Variant>(p);
  Sequence const sequence = plan.sequence(plan.sequence_of_cell(cell));
  int64_t const i = cell - sequence.first_cell;
  if (i < 0 || i >= plan.chunks_of(sequence.length)) return false;
  chunk = chunk_of_head<Variant>(p, sequence, i, value_head);
  return true;
}

template <class E>
struct Columns {
  float g0[kTokensPerThread], g1[kTokensPerThread];  // log2 of the factor by which each token decays each channel

  /// From the gate as given, row by row of `tile`. The first `rows` tokens are live, the others do not decay. Channels
  /// beyond key_dim get some decay: their q, k and state are zero.
  template <class G, class Tile>
  KDA_DEVICE void load(Tile const& tile, int row0, int pair, int rows, ChannelGate const& gate0,
                       ChannelGate const& gate1) {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const x = tile::to_float2<G>(tile::load_pair<G>(&tile.at(row0 + j, 2 * pair)));
      g0[j] = x.x, g1[j] = x.y;
    }
    log2_decays<E>(g0, gate0);
    log2_decays<E>(g1, gate1);
    if (row0 + kTokensPerThread <= rows) return;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      if (row0 + j >= rows) g0[j] = g1[j] = 0.f;
  }

  KDA_DEVICE float2 log2_decay(int j) const { return {g0[j], g1[j]}; }
  /// log2 of the decay over all eight tokens.
  KDA_DEVICE float2 log2_total() const {
    float2 sum = log2_decay(0);
#pragma unroll
    for (int j = 1; j < kTokensPerThread; ++j) sum = sum + log2_decay(j);
    return sum;
  }
  /// g <- the decays themselves, for running products.
  KDA_DEVICE void exponentiate() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) g0[j] = decay_exp2<E>(g0[j]), g1[j] = decay_exp2<E>(g1[j]);
  }
  KDA_DEVICE float2 decay(int j) const { return {g0[j], g1[j]}; }
};

}  // namespace kda
