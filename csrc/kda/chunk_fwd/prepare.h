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
  using Base::chunk, Base::columns, Base::group, Base::lane, Base::p, Base::pair, Base::record, Base::s, Base::thread,
      Base::warp;
  static constexpr int kChunk = Base::kChunk, kBlocks = Base::kBlocks, kKeyTile = Shape::kKeyTile;
  static constexpr int kThreads = Base::kThreads, kWarps = Base::kWarps;
  static constexpr int kBlocksPerSm = 512 / kThreads;  // 128 registers a thread

  KDA_DEVICE void load_chunk() {
    columns.load(p, chunk, group, pair);
    load_values(0);
    columns.decay_from_gate(p, chunk, group, pair);
    s.log2_half[group][0][pair] = columns.log2_half(0);
    s.log2_half[group][1][pair] = columns.log2_half(1);
    if (thread < kChunk) s.beta[thread] = thread < chunk.rows ? load_beta<E>(p, chunk, thread) : 0.f;
    clear(s.a_qk);
  }

  /// The norms of q and k, and whether any thread's gate is too steep for BlockScores.
  KDA_DEVICE void normalise() {
    float norms[2 * kTokensPerThread];
    float largest_key = 0.f;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const q = tile::to_float2<E>(columns.q[j]), k = tile::to_float2<E>(columns.k[j]);
      norms[j] = q.x * q.x + q.y * q.y;
      norms[kTokensPerThread + j] = k.x * k.x + k.y * k.y;
      largest_key = fmaxf(largest_key, norms[kTokensPerThread + j]);
    }
    if (p.l2norm) {
      int const token = this->row(lane % kTokensPerThread);
      s.dots[lane / kTokensPerThread][warp % Shape::kWarpsPerGroup][token] = warp_sum_scattered(norms);
      largest_key = 0.f;
    }
    bool const any = warp_any(is_steep(columns.log2_half(0)) || is_steep(columns.log2_half(1)) ||
                              !(largest_key <= kLargestKey<E> * kLargestKey<E>));
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
    for (int column = warp; column < kKeyTile / 16; column += kWarps) apply_inverse(s.gamma_k, column * 16);
    for (int first = 0; first < p.value_dim; first += kKeyTile) {
      if (first) {
        sync_block();
        load_values(first);
        cp_async_wait<0>();
        sync_block();
      }
      for (int column = warp; column < kKeyTile / 16; column += kWarps) apply_inverse(s.v, column * 16);
      sync_block();
      value_rows_of_o<E>(p, chunk, first).template store<kKeyTile>(s.v, 0, thread, kThreads);
    }
    copy_image(record.w, s.gamma_k);
    copy_image(record.a_qk, s.a_qk);
  }

 private:
  KDA_DEVICE static bool is_steep(float2 log2_half) {  // also where it is nan
    return !(log2_half.x >= -kGentle<E> && log2_half.y >= -kGentle<E>);
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
  template <class Tile>
  KDA_DEVICE void copy_image(E* to, Tile const& from) {
    constexpr int kPieces = Tile::kRows * Tile::kCols / Tile::kPiece;
#pragma unroll
    for (int i = thread; i < kPieces; i += kThreads)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4 const*>(from.data)[i];
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
