// Everything of a chunk that does not depend on the state, for all chunks at once; one block per chunk and value head.
//
//     T = (I + Diag(beta) A_kk)^-1 Diag(beta)      W = T (Gamma.K)      T V
#pragma once
#include "kda/chunk_fwd/scores.h"

namespace kda {

template <class Variant>
struct Prepare : PrepareThread<Variant> {
  using Base = PrepareThread<Variant>;
  using E = typename Base::E;
  using Shape = typename Base::Shape;
  using Base::chunk, Base::columns, Base::group, Base::lane, Base::out, Base::p, Base::pair, Base::s, Base::thread,
      Base::warp;
  using typename Base::DiagonalElement;
  static constexpr int kChunk = Base::kChunk, kBlocks = Base::kBlocks, kKeyTile = Shape::kKeyTile;
  static constexpr int kThreads = Base::kThreads, kWarps = Base::kWarps;
  static constexpr int kBlocksPerSm = (sizeof(E) == 4 ? 512 : 1024) / kThreads;  // 128 or 64 registers a thread

  /// A quarter of the warps each for q, k, g and V, so that a thread has one address to compute.
  KDA_DEVICE void load_chunk() {
    static_assert(kWarps % 4 == 0);
    int const index = warp / 4 * 32 + lane;
    if (warp % 4 == 0) {
      load<E>(s.blocks.q, p.q, p.q_strides, p.q_pieces_aligned, chunk.head, index);
    } else if (warp % 4 == 1) {
      load<E>(s.blocks.k, p.k, p.k_strides, p.k_pieces_aligned, chunk.head, index);
    } else if (warp % 4 == 2) {
      if (p.g_is_fp32)
        load<float>(s.template gate<float>(), p.g, p.g_strides, p.g_pieces_aligned, chunk.value_head, index);
      else load<E>(s.template gate<E>(), p.g, p.g_strides, p.g_pieces_aligned, chunk.value_head, index);
    }
    cp_async_commit();
    if (warp % 4 == 3) load_values(0, index, kThreads / 4);
    cp_async_commit();
    ChannelGate const gate0(p.gate, chunk.value_head, 2 * pair, p.key_dim);
    ChannelGate const gate1(p.gate, chunk.value_head, 2 * pair + 1, p.key_dim);
    if (thread < kChunk) s.beta[thread] = thread < chunk.rows ? load_beta<E>(p, chunk, thread) : 0.f;
    clear(s.a_qk);
    cp_async_wait<1>();
    sync_block();
    if (p.g_is_fp32)
      columns.template load<float>(s.template gate<float>(), this->row(0), pair, chunk.rows, gate0, gate1);
    else columns.template load<E>(s.template gate<E>(), this->row(0), pair, chunk.rows, gate0, gate1);
    s.log2_total[group][pair] = columns.log2_total();
  }

  /// 1 / |q| and 1 / |k| of every token, and whether the gate of any thread or the size of any key is too much for
  /// BlockScores. A few lanes share a row, a piece of 16 bytes each at a time.
  KDA_DEVICE void normalise() {
    constexpr int kPiece = Base::Storage::Wide::kPiece, kPieces = kKeyTile / kPiece;
    constexpr int kLanes = kPieces < 32 ? kPieces : 32, kRows = kWarps * (32 / kLanes), kTurns = 2 * kChunk / kRows;
    static_assert(kTurns * kRows == 2 * kChunk && kChunk % kRows == 0);
    int const row0 = warp * (32 / kLanes) + lane / kLanes;
    float squares[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      auto const& tile = i * kRows < kChunk ? s.blocks.q : s.blocks.k;
      squares[i] = 0.f;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kLanes)
        add_squares(squares[i], &tile.at(i * kRows % kChunk + row0, (piece + lane % kLanes) * kPiece));
    }
    float square = group_sum_scattered(squares);
#pragma unroll
    for (int bits = kTurns; bits < kLanes; bits *= 2) square += shuffle_xor(square, bits);
    bool steep = is_steep(columns.log2_total());
    if (lane % kLanes < kTurns) {
      int const turn = lane % kLanes, row = turn * kRows + row0;  // of q, then of k
      s.norm[row] = p.l2norm ? rsqrt_accurate(square + 1e-6f) : 1.f;
      steep = steep || (!p.l2norm && row >= kChunk && !(square <= kLargestKey<E> * kLargestKey<E>));
    }
    bool const any = warp_any(steep);
    if (lane == 0) s.steep[warp] = any;
    sync_block();
  }

  KDA_DEVICE void scores() {
    bool steep = false;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) steep = steep || s.steep[i];
    if (steep) scores_by(SplitScores<Variant>{*this});
    else scores_by(BlockScores<Variant>{*this});
  }

  /// W over Gamma.K and T V over V; then everything leaves. Each warp has its own columns, the first of them in
  /// registers before all scores are there.
  KDA_DEVICE void solve() {
    constexpr int kUnits = kKeyTile / 16, kTurns = 2 * kUnits / kWarps;
    static_assert(kTurns * kWarps == 2 * kUnits);
    auto const tile = [&](int unit) -> auto& { return unit < kUnits ? s.gamma_k : s.v; };
    tile::Accumulator x[kBlocks][2];
    load_columns(x, tile(warp), warp % kUnits * 16);
    sync_block();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      int const unit = turn * kWarps + warp;
      if (turn) load_columns(x, tile(unit), unit % kUnits * 16);
      solve_columns(x, tile(unit), unit % kUnits * 16);
    }
    sync_block();
    copy(out.record().w.data, s.gamma_k.data);
    copy(out.record().a_qk.data, s.a_qk.data);
    store_values(0);
    for (int first = kKeyTile; first < p.value_dim; first += kKeyTile) {
      sync_block();
      load_values(first, thread, kThreads);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      for (int unit = warp; unit < kUnits; unit += kWarps) {
        load_columns(x, s.v, unit * 16);
        solve_columns(x, s.v, unit * 16);
      }
      sync_block();
      store_values(first);
    }
  }

 private:
  KDA_DEVICE static void add_squares(float& sum, E const* piece) {
    uint4 const bits = *reinterpret_cast<uint4 const*>(piece);
    uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(E) == 4) {
        sum += bits_to_float(words[i]) * bits_to_float(words[i]);
      } else {
        float2 const x = unpack2<E>(words[i]);
        sum += x.x * x.x, sum += x.y * x.y;
      }
    }
  }
  KDA_DEVICE static bool is_steep(float2 log2_total) {  // also where it is nan
    return !(log2_total.x >= -kGentle<E> && log2_total.y >= -kGentle<E>);
  }
  template <class Scores>
  KDA_DEVICE void scores_by(Scores scores) {
    scores.write();
    cp_async_wait<0>();  // V
    sync_block();
    scores.multiply();
  }
  template <class G, class Tile>
  KDA_DEVICE void load(Tile& tile, void const* base, TokenStrides const& strides, bool aligned, int head, int index) {
    tile_rows<G>(base, strides, aligned, chunk, head, 0, p.key_dim)
        .template load<kKeyTile>(tile, 0, index, kThreads / 4);
  }
  KDA_DEVICE void load_values(int first, int index, int count) {
    tile_rows<E>(p.v, p.v_strides, p.v_pieces_aligned, chunk, chunk.value_head, first, p.value_dim - first)
        .template load<kKeyTile>(s.v, 0, index, count);
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

  /// x <- Diag(beta) times sixteen columns of the tile, transposed.
  KDA_DEVICE void load_columns(tile::Accumulator (&x)[kBlocks][2], typename Base::Storage::Wide const& tile,
                               int column) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      tile::load_transposed<E>(x[i][0], x[i][1], tile, i * 16, column);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[i][e / 4].x[e % 4] *= s.beta[i * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2];
    }
  }
  /// The columns <- the solution.
  KDA_DEVICE void solve_columns(tile::Accumulator (&x)[kBlocks][2], typename Base::Storage::Wide& tile, int column) {
    tile::substitute<E, DiagonalElement>(x, s.l, s.diagonal);
    sync_warp();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      tile::store_transposed<E, Shape::kConfig.wgmma>(tile, i * 16, column, x[i][0], x[i][1]);
  }
};

}  // namespace kda
