// Gradients of one chunk of one value head that need no decays: dV, dbeta, and those of the scores.
//
//     dU = A_qk^T dO + K~ dS_C        dR = (I + Diag(beta) A_kk)^-T dU        dV = dX = Diag(beta) dR
//     dbeta_r = <dR_r, U_r> / beta_r  dA_qk = scale dO U^T                    dA_kk = -dX U^T
//
// dU is computed again rather than kept: rounded to 16 bits it would cost dV half of its digits. A_qk has the
// scale. Four warps take a tile of 64 columns of V; where there is room, a block has two at once.
#pragma once
#include "kda/chunk/tile_rows.h"
#include "kda/chunk_bwd/bring.h"
#include "kda/chunk_bwd/cell.h"
#include "kda/chunk_bwd/params.h"
#include "tile/solve.h"

namespace kda {

template <class Variant>
struct ValuesStorage {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Record = ChunkRecord<Variant>;
  typename Record::Wide k_tilde;
  typename Record::Square a_qk, l;  // then dA_qk and dA_kk
  tile::DiagonalBlock diagonal[Shape::kBlocks];
  struct ValueTile {
    union {
      typename BackwardCell<Variant>::State d_state;
      typename Record::Values d_x;
    };
    typename BackwardCell<Variant>::Values u;
    typename Record::Values d_o;
  };
  static constexpr int kTiles = sizeof(E) == 4 || Shape::kKeyTile > 128 ? 1 : 2;  // of V at once
  static constexpr int kWarps = kTiles * kConsumerWarps;
  ValueTile tiles[kTiles];
  float beta[Shape::kChunk], raw_beta[Shape::kChunk];
  bool has_small_beta[kWarps];
  Mbarrier full[kTiles];
  float d_beta[kWarps][Shape::kChunk];
};

template <class Variant>
struct ValueGradients {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Storage = ValuesStorage<Variant>;
  using DiagonalElement = std::conditional_t<sizeof(E) == 4, float, tile::Tf32>;
  static constexpr int kTiles = Storage::kTiles, kWarps = Storage::kWarps, kThreads = 32 * kWarps;
  static constexpr int kChunk = Shape::kChunk, kBlocks = Shape::kBlocks;
  static constexpr int kBlocksPerSm = sizeof(E) == 4 || kTiles == 2 ? 2 : 3;
  static constexpr int kTileThreads = 32 * kConsumerWarps;  // that have one tile
  static_assert(2 * kBlocks <= kWarps);

  ChunkBwdParams const& p;
  Storage& s;
  BackwardCell<Variant> const cell;
  ChunkOfHead const chunk;
  int const thread = thread_index(), warp = thread / 32, lane = thread % 32;
  int const own = warp / kConsumerWarps;  // of the tiles in hand, this warp's
  tile::Accumulator da[kBlocks][2] = {};  // of A_qk or A_kk, rows of one block of tokens

  KDA_DEVICE void run() {
    for (int i = 0; i < kTiles; ++i) bringer(i).init();
    tile_rows<E>(p.l, chunk, chunk.value_head, 0, kChunk).template load<kChunk>(s.l, 0, thread, kThreads);
    sync_block();
    for (int first = 0; first < cell.tiles; first += kTiles) {
      if (first) {
        for (int i = 0; i < kTiles; ++i) bringer(i).release();
        sync_block();
      }
      int const count = cell.tiles - first < kTiles ? cell.tiles - first : kTiles;
      load_tiles(first, count);
      if (!first) load_beta_of_chunk();
      cp_async_wait<0>();
      sync_block();
      for (int i = 0; i < count; ++i) bringer(i).wait(first / kTiles % 2);
      tile::Accumulator d_x[kBlocks][2];
      if (own < count) solve(d_x, first + own);
      sync_block();  // dX lies where dS_C was
      if (own < count) put(d_x);
      sync_block();
      if (own < count) store_values(first + own);
      add_scores(count);
    }
    sum_beta();
    store_scores();
  }

 private:
  KDA_DEVICE void load_beta_of_chunk() {
    bool const live = thread < chunk.rows;
    float const raw = live ? load_beta<E>(p, chunk, thread) : 0.f, beta = live ? write_strength(p, raw) : 0.f;
    if (thread < kChunk) s.raw_beta[thread] = raw, s.beta[thread] = beta;
    bool const small = warp_any(live && at_least<E>(beta) != beta);
    if (lane == 0) s.has_small_beta[warp] = small;
  }
  KDA_DEVICE auto bringer(int i) const { return Bringer<Shape::kConfig.wgmma, kThreads>{s.full[i], thread}; }
  /// Into the places of tiles 0 to count - 1. With the first ones comes what all tiles need.
  KDA_DEVICE void load_tiles(int first, int count) {
    for (int i = 0; i < count; ++i) {
      auto& to = s.tiles[i];
      auto& d_state = cell.d_state(first + i);
      auto& u = cell.u(first + i);
      if (first + i) {
        bringer(i).bring(to.d_state, d_state, to.u, u);
      } else {
        auto& inverse = cell.inverse();
        bringer(i).bring(to.d_state, d_state, to.u, u, s.k_tilde, cell.record().k_tilde, s.a_qk.data,
                         cell.record().a_qk.data, s.diagonal, inverse.diagonal);
      }
    }
    if (own < count)
      rows_of(p.d_o, first + own).template load<kValueTile>(s.tiles[own].d_o, 0, thread_of_tile(), kTileThreads);
    cp_async_commit();
  }
  KDA_DEVICE auto rows_of(Rows const& x, int tile) const {
    return tile_rows<E>(x, chunk, chunk.value_head, tile * kValueTile, p.value_dim - tile * kValueTile);
  }
  KDA_DEVICE int thread_of_tile() const { return thread % kTileThreads; }

  /// Of this warp's 16 columns of V, transposed: dU, dR and what it adds to dbeta, and dX. Until dbeta is known, U is
  /// that of a beta which it can be divided by.
  KDA_DEVICE void solve(tile::Accumulator (&x)[kBlocks][2], int tile) {
    auto const& in = s.tiles[own];
    int const row = this->row();
    bool small_beta = false;
    for (bool small : s.has_small_beta) small_beta = small_beta || small;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) x[i][0] = x[i][1] = tile::Accumulator{};
#pragma unroll
    for (int d = 0; d < Shape::kKeyTile; d += 16) {
      auto const left = tile::load_left<E>(in.d_state, row, d);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        tile::multiply<E>(x[i][0], x[i][1], left, tile::load_right<E>(s.k_tilde, i * 16, d));
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      auto const left = tile::load_left_transposed<E>(in.d_o, j * 16, row);
#pragma unroll
      for (int i = 0; i <= j; ++i)
        tile::multiply<E>(x[i][0], x[i][1], left, tile::load_right_transposed<E>(s.a_qk, j * 16, i * 16));
    }
    tile::substitute_transposed<E, DiagonalElement>(x, s.l, s.diagonal);
    constexpr int kAtOnce = kBlocks < 2 ? 1 : 2;  // blocks of tokens
    float d_beta[4 * kAtOnce];  // of the lane's columns: tokens half * 8 + lane % 4 * 2, and the one after
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const column = i * 16 + half * 8;
        tile::Accumulator u = tile::load_accumulator<E>(in.u, row, column);
        float2 const beta = *reinterpret_cast<float2 const*>(&s.beta[column + lane % 4 * 2]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float const d = x[i][half].x[e] * u.x[e];
          float& sum = d_beta[4 * (i % kAtOnce) + 2 * half + e % 2];
          sum = e < 2 ? d : sum + d;
          x[i][half].x[e] *= e % 2 ? beta.y : beta.x;
        }
        if (small_beta) keep_true_values(u, beta, tile, row, column);
      }
      if (i % kAtOnce == kAtOnce - 1) add_beta(d_beta, i - i % kAtOnce, tile >= kTiles);
    }
  }
  /// The sums over this warp's columns of V, from token first_block * 16 on; `more`: beside those of other tiles.
  template <int kCount>
  KDA_DEVICE void add_beta(float const (&partial)[kCount], int first_block, bool more) {
    float sum = group_sum_scattered<kCount, 4>(partial);
#pragma unroll
    for (int bits = 4 * kCount; bits < 32; bits *= 2) sum += shuffle_xor(sum, bits);
    int const i = lane / 4 % kCount;
    float& to = s.d_beta[warp][first_block * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2];
    if (lane < 4 * kCount) to = more ? to + sum : sum;
  }
  KDA_DEVICE int row() const { return warp % kConsumerWarps * 16; }
  KDA_DEVICE void put(tile::Accumulator const (&d_x)[kBlocks][2]) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      tile::store_transposed<E, Shape::kConfig.wgmma>(s.tiles[own].d_x, i * 16, row(), d_x[i][0], d_x[i][1]);
  }

  /// U of the beta that is, instead of the one that dbeta is divided by.
  KDA_DEVICE void keep_true_values(tile::Accumulator& u, float2 beta, int tile, int row, int column) {
    float2 const share{beta_share<E>(beta.x), beta_share<E>(beta.y)};
#pragma unroll
    for (int e = 0; e < 4; ++e) u.x[e] *= e % 2 ? share.y : share.x;
    tile::store_accumulator<E>(s.tiles[own].u, row, column, u);
    tile::store_accumulator<E>(cell.u(tile), row, column, u);
  }

  KDA_DEVICE void store_values(int tile) {
    rows_of(p.dv, tile).template store<kValueTile>(s.tiles[own].d_x, 0, thread_of_tile(), kTileThreads);
  }

  /// The first warps have a block of rows of A_qk each, the next ones of A_kk.
  KDA_DEVICE bool has_scores() const { return warp < 2 * kBlocks; }
  KDA_DEVICE bool of_kk() const { return warp >= kBlocks; }
  KDA_DEVICE int score_block() const { return warp % kBlocks; }
  KDA_DEVICE void add_scores(int count) {
    if (!has_scores()) return;
    for (int i = 0; i < count; ++i) {
      auto const& in = s.tiles[i];
#pragma unroll
      for (int d = 0; d < kValueTile; d += 16) {
        auto const left = tile::load_left<E>(of_kk() ? in.d_x : in.d_o, score_block() * 16, d);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
          if (j <= score_block())
            tile::multiply<E>(da[j][0], da[j][1], left, tile::load_right_transposed<E>(in.u, d, j * 16));
      }
    }
  }

  /// dbeta, through the sigmoid where there is one.
  KDA_DEVICE void sum_beta() {
    sync_block();
    if (thread >= chunk.rows || !p.dbeta.data) return;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i)
      if (i / kConsumerWarps < cell.tiles) sum += s.d_beta[i][thread];
    sum /= at_least<E>(s.beta[thread]);
    if (p.beta_sigmoid) {
      float const x = s.raw_beta[thread];
      sum *= (p.neg_eigval ? 2.f : 1.f) * sigmoid(x) * sigmoid(-x);
    }
    RowStrides const& st = p.dbeta.strides;
    int64_t const at = chunk.batch_row * st.batch + (chunk.begin + thread) * st.token + chunk.value_head * st.head;
    if (p.dbeta.is_fp32) static_cast<float*>(p.dbeta.data)[at] = sum;
    else static_cast<E*>(p.dbeta.data)[at] = from_float<E>(sum);
  }

  /// Over K~ and what follows it in the cell, which this block alone still reads.
  KDA_DEVICE void store_scores() {
    if (has_scores()) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) store_scores(j * 16 + half * 8, da[j][half]);
    }
    if constexpr (KeysSlice<Variant>::kSlices > 1) {
      static_assert(2 * kChunk <= kThreads);
      for (auto& of_slice : cell.sums().dots)
        if (thread < 2 * kChunk) of_slice[thread] = 0.f;
    }
    sync_block();
    copy(cell.score_gradients().qk, s.a_qk);
    copy(cell.score_gradients().kk, s.l);
  }
  KDA_DEVICE void store_scores(int column0, tile::Accumulator const& d) {
    float const scale = of_kk() ? -1.f : p.scale;
    auto& to = of_kk() ? s.l : s.a_qk;
    tile::for_pairs([&](int row, int column, int e) {
      int const r = score_block() * 16 + row, i = column0 + column;
      float2 const scaled{scale * d.x[e], scale * d.x[e + 1]};
      tile::store_pair<E>(&to.at(r, i), tile::to_pair<E>(i < r ? scaled.x : 0.f, i + 1 < r ? scaled.y : 0.f));
      if (of_kk()) return;
      if (i == r) cell.sums().diagonal[r] = scaled.x;
      if (i + 1 == r) cell.sums().diagonal[r] = scaled.y;
    });
  }
  template <class T>
  KDA_DEVICE void copy(T& to, T const& from) {
    for (int i = thread; i < int(sizeof(T) / 16); i += kThreads)
      reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<uint4 const*>(&from)[i];
  }
};

}  // namespace kda
