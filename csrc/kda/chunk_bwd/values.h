// Gradients of one chunk of one value head that need no decays: dV, dbeta, and those of the scores.
//
//     dU = A_qk^T dO + K~ dS_C        dR = (I + Diag(beta) A_kk)^-T dU        dV = dX = Diag(beta) dR
//     dbeta_r = <dR_r, U_r> / beta_r  dA_qk = scale dO U^T                    dA_kk = -dX U^T
//
// dU is computed again rather than kept: rounded to 16 bits it would cost dV half of its digits. A_qk has the
// scale.
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
  union {  // of the tile of V in hand, as u and d_o
    typename BackwardCell<Variant>::State d_state;
    typename Record::Values d_x;
  };
  typename BackwardCell<Variant>::Values u;
  typename Record::Values d_o;
  float beta[Shape::kChunk], raw_beta[Shape::kChunk];
  bool has_small_beta[kConsumerWarps];
  Mbarrier full;
  float d_beta[kConsumerWarps][Shape::kChunk];
};

template <class Variant>
struct ValueGradients {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Storage = ValuesStorage<Variant>;
  using DiagonalElement = std::conditional_t<sizeof(E) == 4, float, tile::Tf32>;
  static constexpr int kThreads = 32 * kConsumerWarps, kChunk = Shape::kChunk, kBlocks = Shape::kBlocks;
  static constexpr int kBlocksPerSm = sizeof(E) == 4 ? 2 : 3;
  static_assert(kBlocks <= kConsumerWarps);

  ChunkBwdParams const& p;
  Storage& s;
  BackwardCell<Variant> const cell;
  ChunkOfHead const chunk;
  int const thread = thread_index(), warp = thread / 32, lane = thread % 32;
  Bringer<Shape::kConfig.wgmma, kThreads> const bringer{s.full, thread};
  float d_beta[2 * kBlocks][2] = {};         // of this lane's columns: tokens 8 i + lane % 4 * 2
  tile::Accumulator da_qk[kBlocks][2] = {};  // rows of block `warp`
  tile::Accumulator da_kk[kBlocks][2] = {};

  KDA_DEVICE void run() {
    bringer.init();
    load_beta_of_chunk();
    sync_block();
    for (int tile = 0; tile < cell.tiles; ++tile) {
      if (tile) {
        bringer.release();
        sync_block();
      }
      load_tile(tile);
      cp_async_wait<0>();
      sync_block();  // the barrier of the copies is there
      bringer.wait(tile % 2);
      solve(tile);
      sync_block();
      store_values(tile);
      add_scores();
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
  KDA_DEVICE void load_tile(int tile) {
    auto& d_state = cell.d_state(tile);
    if (tile) {
      bringer.bring(s.d_state, d_state, s.u, cell.u(tile));
    } else {
      auto& inverse = cell.inverse();
      bringer.bring(s.d_state, d_state, s.u, cell.u(tile), s.k_tilde, cell.record().k_tilde, s.a_qk, cell.record().a_qk,
                    s.l, inverse.l, s.diagonal, inverse.diagonal);
    }
    tile_rows<E>(p.d_o, chunk, chunk.value_head, tile * kValueTile, p.value_dim - tile * kValueTile)
        .template load<kValueTile>(s.d_o, 0, thread, kThreads);
    cp_async_commit();
  }

  /// Of this warp's 16 columns of V, transposed: dU, dR and what it adds to dbeta, and dX. Until dbeta is known, U is
  /// that of a beta which it can be divided by.
  KDA_DEVICE void solve(int tile) {
    int const row = warp * 16;
    bool small_beta = false;
    for (bool small : s.has_small_beta) small_beta = small_beta || small;
    tile::Accumulator x[kBlocks][2] = {};
#pragma unroll
    for (int d = 0; d < Shape::kKeyTile; d += 16) {
      auto const left = tile::load_left<E>(s.d_state, row, d);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        tile::multiply<E>(x[i][0], x[i][1], left, tile::load_right<E>(s.k_tilde, i * 16, d));
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      auto const left = tile::load_left_transposed<E>(s.d_o, j * 16, row);
#pragma unroll
      for (int i = 0; i <= j; ++i)
        tile::multiply<E>(x[i][0], x[i][1], left, tile::load_right_transposed<E>(s.a_qk, j * 16, i * 16));
    }
    tile::substitute_transposed<E, DiagonalElement>(x, s.l, s.diagonal);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const column = i * 16 + half * 8;
        tile::Accumulator u = tile::load_accumulator<E>(s.u, row, column);
        float2 const beta = *reinterpret_cast<float2 const*>(&s.beta[column + lane % 4 * 2]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          d_beta[2 * i + half][e % 2] += x[i][half].x[e] * u.x[e];
          x[i][half].x[e] *= e % 2 ? beta.y : beta.x;
        }
        if (small_beta) keep_true_values(u, beta, tile, row, column);
      }
    }
    sync_block();  // dX lies where dS_C was
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      tile::store_transposed<E, Shape::kConfig.wgmma>(s.d_x, i * 16, row, x[i][0], x[i][1]);
  }

  /// U of the beta that is, instead of the one that dbeta is divided by.
  KDA_DEVICE void keep_true_values(tile::Accumulator& u, float2 beta, int tile, int row, int column) {
    float2 const share{beta_share<E>(beta.x), beta_share<E>(beta.y)};
#pragma unroll
    for (int e = 0; e < 4; ++e) u.x[e] *= e % 2 ? share.y : share.x;
    tile::store_accumulator<E>(s.u, row, column, u);
    tile::store_accumulator<E>(cell.u(tile), row, column, u);
  }

  KDA_DEVICE void store_values(int tile) {
    tile_rows<E>(p.dv, chunk, chunk.value_head, tile * kValueTile, p.value_dim - tile * kValueTile)
        .template store<kValueTile>(s.d_x, 0, thread, kThreads);
  }

  /// A warp has the rows of one block of tokens.
  KDA_DEVICE void add_scores() {
    if (warp >= kBlocks) return;
#pragma unroll
    for (int d = 0; d < kValueTile; d += 16) {
      auto const of_o = tile::load_left<E>(s.d_o, warp * 16, d), of_x = tile::load_left<E>(s.d_x, warp * 16, d);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (j > warp) continue;
        auto const right = tile::load_right_transposed<E>(s.u, d, j * 16);
        tile::multiply<E>(da_qk[j][0], da_qk[j][1], of_o, right);
        tile::multiply<E>(da_kk[j][0], da_kk[j][1], of_x, right);
      }
    }
  }

  /// dbeta, through the sigmoid where there is one.
  KDA_DEVICE void sum_beta() {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = d_beta[i][e];
#pragma unroll
        for (int bits = 4; bits < 32; bits *= 2) sum += shuffle_xor(sum, bits);
        if (lane < 4) s.d_beta[warp][i * 8 + lane * 2 + e] = sum;
      }
    sync_block();
    if (thread >= chunk.rows || !p.dbeta.data) return;
    float sum = 0.f;
#pragma unroll
    for (auto const& part : s.d_beta) sum += part[thread];
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

  /// Over W and K~ in the cell, which this block alone still reads.
  KDA_DEVICE void store_scores() {
    if (warp < kBlocks) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) store_scores(j * 16 + half * 8, da_qk[j][half], da_kk[j][half]);
    }
    sync_block();
    copy(cell.score_gradients().qk, s.a_qk);
    copy(cell.score_gradients().kk, s.l);
  }
  KDA_DEVICE void store_scores(int column0, tile::Accumulator const& qk, tile::Accumulator const& kk) {
    tile::for_pairs([&](int row, int column, int e) {
      int const r = warp * 16 + row, i = column0 + column;
      float2 const scaled{p.scale * qk.x[e], p.scale * qk.x[e + 1]};
      tile::store_pair<E>(&s.a_qk.at(r, i), tile::to_pair<E>(i < r ? scaled.x : 0.f, i + 1 < r ? scaled.y : 0.f));
      tile::store_pair<E>(&s.l.at(r, i), tile::to_pair<E>(i < r ? -kk.x[e] : 0.f, i + 1 < r ? -kk.x[e + 1] : 0.f));
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
