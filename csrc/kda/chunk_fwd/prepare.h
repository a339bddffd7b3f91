// Everything of a chunk that does not depend on the state, for all chunks at once; one block per chunk and value head.
//
//     T = (I + Diag(beta) A_kk)^-1 Diag(beta)      W = T (Gamma.K)      T V, left in the place of O
#pragma once
#include "kda/chunk_fwd/scores.h"
#include "tile/solve.h"

namespace kda {

template <class Variant>
struct Prepare : PrepareThread<Variant> {
  using Base = PrepareThread<Variant>;
  using E = typename Base::E;
  using Shape = typename Base::Shape;
  using SolveElement = std::conditional_t<sizeof(E) == 4, float, tile::Tf32>;
  using Base::chunk, Base::columns, Base::group, Base::lane, Base::out, Base::p, Base::pair, Base::s, Base::thread,
      Base::warp;
  static constexpr int kChunk = Base::kChunk, kBlocks = Base::kBlocks, kKeyTile = Shape::kKeyTile;
  static constexpr int kThreads = Base::kThreads, kWarps = Base::kWarps;
  static constexpr int kBlocksPerSm = (sizeof(E) == 4 ? 512 : 1024) / kThreads;  // 128 or 64 registers a thread

  KDA_DEVICE void load_chunk() {
    columns.load(p, chunk, group, pair);
    load_values(0);
    columns.decay_from_gate(p, chunk, group, pair);
    s.log2_total[group][pair] = columns.log2_total();
    if (thread < kChunk) s.beta[thread] = thread < chunk.rows ? load_beta<E>(p, chunk, thread) : 0.f;
    clear(s.a_qk);
  }

  /// The norms of q and k, and whether any thread's gate is too steep for BlockScores.
  KDA_DEVICE void normalise() {
    float norms[2 * kTokensPerThread], largest_key = 0.f;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const q = tile::to_float2<E>(columns.q[j]), k = tile::to_float2<E>(columns.k[j]);
      norms[j] = q.x * q.x + q.y * q.y;
      norms[kTokensPerThread + j] = k.x * k.x + k.y * k.y;
    }
    if (p.l2norm) {
      this->sum_over_channels(norms);
    } else {
#pragma unroll
      for (int j = 0; j < kTokensPerThread; ++j) largest_key = fmaxf(largest_key, norms[kTokensPerThread + j]);
    }
    bool const any = warp_any(is_steep(columns.log2_total()) || !(largest_key <= kLargestKey<E> * kLargestKey<E>));
    if (lane == 0) s.steep[warp] = any;
    sync_block();
    if (thread < kChunk) {
      s.q_norm[thread] = p.l2norm ? rsqrt_accurate(this->summed(0, thread) + 1e-6f) : 1.f;
      s.k_norm[thread] = p.l2norm ? rsqrt_accurate(this->summed(1, thread) + 1e-6f) : 1.f;
    }
    sync_block();
  }

  KDA_DEVICE void scores() {
    bool steep = false;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) steep = steep || s.steep[i];
    if (steep) scores_by<SplitScores<Variant>>();
    else scores_by<BlockScores<Variant>>();
    cp_async_wait<0>();
    sync_block();
  }

  KDA_DEVICE void solve() {
    if (thread < kChunk) tile::invert_diagonal_block(s.l, thread / 16 * 16, thread % 16, kChunk == 16 ? 0xffffu : ~0u);
    sync_block();
    for (int column = warp; column < kBlocks; column += kWarps) {
      tile::Accumulator x[kBlocks][2];
      tile::invert_block_column<SolveElement>(x, s.l, column);
      store_block_column(x, column);
    }
    sync_block();
  }

  /// W over Gamma.K and T V over V; then everything leaves.
  KDA_DEVICE void apply() {
    constexpr int kUnits = kKeyTile / 16;
    for (int unit = warp; unit < 2 * kUnits; unit += kWarps)
      apply_inverse(unit < kUnits ? s.gamma_k : s.v, unit % kUnits * 16);
    sync_block();
    copy(out.record().w.data, s.gamma_k.data);
    copy(out.record().a_qk.data, s.a_qk.data);
    store_values(0);
    for (int first = kKeyTile; first < p.value_dim; first += kKeyTile) {
      sync_block();
      load_values(first);
      cp_async_wait<0>();
      sync_block();
      for (int unit = warp; unit < kUnits; unit += kWarps) apply_inverse(s.v, unit * 16);
      sync_block();
      store_values(first);
    }
  }

 private:
  KDA_DEVICE static bool is_steep(float2 log2_total) {  // also where it is nan
    return !(log2_total.x >= -kGentle<E> && log2_total.y >= -kGentle<E>);
  }
  template <class Scores>
  KDA_DEVICE void scores_by() {
    Scores scores{*this};
    scores.write();
    sync_block();
    scores.multiply();
  }
  KDA_DEVICE void load_values(int first) {
    value_rows_of_v<E>(p, chunk, first).template load<kKeyTile>(s.v, 0, thread, kThreads);
    cp_async_commit();
  }
  template <class Tile>
  KDA_DEVICE void clear(Tile& t) {
    for (int i = thread; i < int(sizeof(Tile) / 16); i += kThreads) reinterpret_cast<uint4*>(&t)[i] = uint4{};
  }
  template <int kCount>
  KDA_DEVICE void copy(E (&to)[kCount], E const (&from)[kCount]) {
    constexpr int kPieces = kCount * int(sizeof(E)) / 16;
#pragma unroll
    for (int i = 0; i < kPieces; i += kThreads)
      if (i + thread < kPieces)
        reinterpret_cast<uint4*>(to)[i + thread] = reinterpret_cast<uint4 const*>(from)[i + thread];
  }
  /// The tiles of 64 columns that lie in the panels of s.v, one behind the other.
  KDA_DEVICE void store_values(int first) {
    using Values = typename Base::Record::Values;
    auto const* const tiles = reinterpret_cast<Values const*>(s.v.data);
    for (int i = 0; i < kKeyTile / kValueTile && first + i * kValueTile < p.value_dim; ++i)
      copy(out.values(first / kValueTile + i).data, tiles[i].data);
  }

  KDA_DEVICE void store_block_column(tile::Accumulator const (&x)[kBlocks][2], int column) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int const row = i * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2, col = column * 16 + lane / 4 + e % 4 / 2 * 8;
        if (i >= column) s.t.at(row, col) = from_float<E>(x[i][e / 4].x[e % 4] * s.beta[col]);
      }
  }

  /// Sixteen columns of the tile <- T times them. Only this warp touches them.
  KDA_DEVICE void apply_inverse(typename Base::Storage::Wide& tile, int column) {
    tile::Accumulator acc[kBlocks][2] = {};
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      auto const right = tile::load_right_transposed<E>(tile, j * 16, column);
#pragma unroll
      for (int i = j; i < kBlocks; ++i)
        tile::multiply<E>(acc[i][0], acc[i][1], tile::load_left<E>(s.t, i * 16, j * 16), right);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int e = 0; e < 8; e += 2)
        tile::store_pair<E>(&tile.at(i * 16 + lane / 4 + e / 2 % 2 * 8, column + e / 4 * 8 + lane % 4 * 2),
                            tile::to_pair<E>(acc[i][e / 4].x[e % 4], acc[i][e / 4].x[e % 4 + 1]));
  }
};

}  // namespace kda
