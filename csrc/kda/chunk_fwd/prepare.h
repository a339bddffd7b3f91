// Everything of a chunk that does not depend on the state, for all chunks at once: A_qk and T.
//
// One block per chunk and value head. A_kk and A_qk are collected from the splits of the chunk, halves first, down to
// single tokens; at the split [lo, m, hi) every row r >= m and column i < m meets at the anchor m:
//     A[r, i] = sum_d (x_r prod_{m..r} e^g) (k_i prod_{i+1..m-1} e^g)          both products <= 1
// so one tensor-core product serves any gate. The diagonal has no decay and is a plain dot product.
#pragma once
#include "kda/chunk_fwd/columns.h"
#include "kda/chunk_fwd/workspace.h"
#include "tile/mma_tile.h"
#include "tile/solve.h"

namespace kda {

template <class Variant>
struct PrepareStorage {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  static constexpr int kChunk = Shape::kChunk, kKeyTile = Shape::kKeyTile;

  struct Split {                                 // operands of one level of splits
    tile::SharedTile<E, kChunk, kKeyTile> rows;  // per split: q of its upper half, then k of its upper half
    tile::SharedTile<E, (kChunk > 32 ? kChunk / 2 : 16), kKeyTile> cols;  // per split: k of its lower half
  } split[2];                                                             // levels alternate
  tile::SharedTile<float, kChunk, kChunk> l;  // Diag(beta) A_kk, then its inverted diagonal blocks
  typename ChunkRecord<Variant>::Square a_qk, t;
  float2 total[Shape::kGroups][Shape::kPairs];   // decay over each group of 16 tokens
  float dots[3][Shape::kWarpsPerGroup][kChunk];  // partial q.q, k.k, q.k
  float q_norm[kChunk], k_norm[kChunk], beta[kChunk];
};

template <class Variant>
struct Prepare {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using SolveElement = std::conditional_t<sizeof(E) == 4, float, tile::Tf32>;
  static constexpr int kChunk = Shape::kChunk;
  static constexpr int kThreads = Shape::kColumnThreads;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBlocksPerSm = 512 / kThreads;  // 128 registers a thread

  ChunkFwdParams const& p;
  PrepareStorage<Variant>& s;
  ChunkOfHead chunk;
  Columns<Variant> columns;
  float2 q[kTokensPerThread], k[kTokensPerThread];  // normalised
  int const thread = thread_index(), warp = thread / 32, lane = thread % 32;
  int const group = thread / Shape::kPairs, pair = thread % Shape::kPairs;

  KDA_DEVICE Prepare(ChunkFwdParams const& params, PrepareStorage<Variant>& storage, ChunkOfHead const& c)
      : p(params), s(storage), chunk(c) {}

  KDA_DEVICE void load_chunk() {
    columns.load(p, chunk, group, pair);
    columns.decay_from_gate(p, chunk, group, pair);
    s.total[group][pair] = columns.total();
    if (thread < kChunk) s.beta[thread] = thread < chunk.rows ? load_beta<E>(p, chunk, thread) : 0.f;
    clear(s.a_qk);
    clear(s.t);
  }

  /// q.q, k.k and q.k of every token: the norms and the diagonal of A_qk.
  KDA_DEVICE void dot_products() {
    float norms[2 * kTokensPerThread], qk[kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const q = tile::to_float2<E>(columns.q[j]), k = tile::to_float2<E>(columns.k[j]);
      norms[j] = q.x * q.x + q.y * q.y;
      norms[kTokensPerThread + j] = k.x * k.x + k.y * k.y;
      qk[j] = q.x * k.x + q.y * k.y;
    }
    int const part = warp % Shape::kWarpsPerGroup, token = group * kTokensPerThread + lane % kTokensPerThread;
    s.dots[lane / kTokensPerThread][part][token] = warp_sum_scattered(norms);
    float const dot = warp_sum_scattered(qk);
    if (lane < kTokensPerThread) s.dots[2][part][token] = dot;
    sync_block();
    if (thread < kChunk) finish_token(thread);
    sync_block();
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float const q_norm = s.q_norm[group * kTokensPerThread + j], k_norm = s.k_norm[group * kTokensPerThread + j];
      q[j] = tile::to_float2<E>(columns.q[j]) * float2{q_norm, q_norm};
      k[j] = tile::to_float2<E>(columns.k[j]) * float2{k_norm, k_norm};
    }
  }

  /// L = Diag(beta) A_kk and scale * A_qk, split by split.
  template <int kHalf = kChunk / 2>
  KDA_DEVICE void scores() {
    if constexpr (kHalf >= 1) {
      auto& split = s.split[kHalf == 32 || kHalf == 8 || kHalf == 2];
      write_split<kHalf>(split);
      sync_block();
      multiply_split<kHalf>(split);
      scores<kHalf / 2>();
    }
  }

  KDA_DEVICE void solve() {
    sync_block();
    if (thread < kChunk) tile::invert_diagonal_block(s.l, thread / 16 * 16, thread % 16, kChunk == 16 ? 0xffffu : ~0u);
    sync_block();
    for (int column = warp; column < kChunk / 16; column += kWarps) {
      tile::Accumulator x[kChunk / 16][2];
      tile::invert_block_column<SolveElement>(x, s.l, column);
      store_block_column(x, column);
    }
    sync_block();
  }

  KDA_DEVICE void store(ChunkRecord<Variant>& record) {
    copy_image(record.t, s.t);
    copy_image(record.a_qk, s.a_qk);
    if (thread < kChunk) record.q_norm[thread] = s.q_norm[thread], record.k_norm[thread] = s.k_norm[thread];
  }

 private:
  template <class Tile>
  KDA_DEVICE void clear(Tile& t) {
    for (int i = thread; i < int(sizeof(Tile) / 16); i += kThreads) reinterpret_cast<uint4*>(&t)[i] = uint4{};
  }
  template <class Tile>
  KDA_DEVICE void copy_image(E* to, Tile const& from) {
    constexpr int kPieces = Tile::kRows * Tile::kCols / Tile::kPiece;
    for (int i = thread; i < kPieces; i += kThreads)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4 const*>(from.data)[i];
  }

  KDA_DEVICE void finish_token(int token) {
    float dot[3] = {};
#pragma unroll
    for (int part = 0; part < Shape::kWarpsPerGroup; ++part)
#pragma unroll
      for (int i = 0; i < 3; ++i) dot[i] += s.dots[i][part][token];
    s.q_norm[token] = p.l2norm ? rsqrt_accurate(dot[0] + 1e-6f) : 1.f;
    s.k_norm[token] = p.l2norm ? rsqrt_accurate(dot[1] + 1e-6f) : 1.f;
    s.a_qk.at(token, token) = from_float<E>(p.scale * dot[2] * s.q_norm[token] * s.k_norm[token]);
  }

  /// The decay between this group's tokens and the anchor that lies beyond the neighbouring groups: the product of
  /// the groups strictly between.
  template <int kHalf>
  KDA_DEVICE float2 groups_to_anchor(bool upper) const {
    float2 product{1.f, 1.f};
    if constexpr (kHalf > kTokensPerThread) {
      static_assert(kHalf == 2 * kTokensPerThread, "at most one group lies between");
      if (upper && group % 2 == 1) product = s.total[group - 1][pair];
      if (!upper && group % 2 == 0) product = s.total[group + 1][pair];
    }
    return product;
  }

  /// The tokens [first, first + count) of this thread's 16, all on one side of their split.
  template <int kHalf>
  KDA_DEVICE void write_side(typename PrepareStorage<Variant>::Split& split, bool upper, int first, int count) {
    int const token0 = group * kTokensPerThread + first;
    int const block = token0 / (2 * kHalf), in_half = token0 % kHalf;
    float2 decay = groups_to_anchor<kHalf>(upper);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      int const j = upper ? n : count - 1 - n;  // outwards from the anchor
      if (upper) {
        decay = decay * columns.decay(first + j);
        int const row = block * 2 * kHalf + in_half + j;
        store_pair(split.rows, row, q[first + j] * decay);
        store_pair(split.rows, row + kHalf, k[first + j] * decay);
      } else {
        store_pair(split.cols, block * kHalf + in_half + j, k[first + j] * decay);
        decay = decay * columns.decay(first + j);
      }
    }
  }
  template <class Tile>
  KDA_DEVICE void store_pair(Tile& t, int row, float2 x) {
    tile::store_pair<E>(&t.at(row, 2 * pair), tile::to_pair<E>(x.x, x.y));
  }

  template <int kHalf>
  KDA_DEVICE void write_split(typename PrepareStorage<Variant>::Split& split) {
    if constexpr (kHalf >= kTokensPerThread) {
      if (group * kTokensPerThread & kHalf) write_side<kHalf>(split, true, 0, kTokensPerThread);
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
  KDA_DEVICE void multiply_split(typename PrepareStorage<Variant>::Split const& split) {
    constexpr int kAcross = kHalf >= 16 ? kHalf / 16 : 1;
    for (int unit = warp; unit < kChunk / 16 * kAcross; unit += kWarps) {
      int const m = unit / kAcross;
      int const n = kHalf >= 16 ? m * 16 / (2 * kHalf) * kHalf + unit % kAcross * 16 : m / 2 * 16;
      tile::Accumulator acc[2] = {};
      if constexpr (kHalf >= 16) {
#pragma unroll
        for (int d = 0; d < Shape::kKeyTile; d += 16)
          tile::multiply<E>(acc[0], acc[1], tile::load_left<E>(split.rows, m * 16, d),
                            tile::load_right<E>(split.cols, n, d));
        store_scores<kHalf>(acc[0], m * 16, n);
        store_scores<kHalf>(acc[1], m * 16, n + 8);
      } else {
#pragma unroll
        for (int d = 0; d < Shape::kKeyTile; d += 16)
          tile::multiply_half<E>(acc[0], tile::load_left<E>(split.rows, m * 16, d),
                                 tile::load_right<E>(split.cols, n, d), m % 2 == 1);
        store_scores<kHalf>(acc[0], m * 16, n + m % 2 * 8);
      }
    }
  }

  template <int kHalf>
  KDA_DEVICE void store_scores(tile::Accumulator const& acc, int row0, int col0) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const row = row0 + lane / 4 + e / 2 * 8, col = col0 + lane % 4 * 2 + e % 2;
      int const block = row / (2 * kHalf);
      if (block != col / kHalf) continue;
      int const r = block * 2 * kHalf + kHalf + row % kHalf, i = block * 2 * kHalf + col % kHalf;
      if (row % (2 * kHalf) >= kHalf) s.l.at(r, i) = s.beta[r] * acc.x[e];
      else s.a_qk.at(r, i) = from_float<E>(p.scale * acc.x[e]);
    }
  }

  KDA_DEVICE void store_block_column(tile::Accumulator const (&x)[kChunk / 16][2], int column) {
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int const row = i * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2, col = column * 16 + lane / 4 + e % 4 / 2 * 8;
        if (i >= column) s.t.at(row, col) = from_float<E>(x[i][e / 4].x[e % 4] * s.beta[col]);
      }
  }
};

}  // namespace kda
