// The recurrence over chunks. One block per sequence, value head and 64 columns of V.
//
// Consumer warps each hold 16 rows of the transposed state S^T (V x K) as accumulators for the whole sequence; every
// product takes its left operand from registers, so the state never travels through shared memory and warps meet only
// where the producers hand over a chunk:
//     X^T = V^T - S^T (Gamma.K)^T      U^T = X^T T^T
//     O^T = S^T (scale Gamma.Q)^T + U^T A_qk^T          S^T <- S^T Diag(Gamma_C) + U^T K~
// Producer warps build Gamma.K, Gamma.Q and K~ of the next chunk meanwhile (columns.h).
#pragma once
#include "kda/chunk_fwd/columns.h"
#include "kda/chunk_fwd/state_io.h"
#include "kda/chunk_fwd/workspace.h"
#include "tile/products.h"

namespace kda {

template <class Variant>
struct ScanStorage {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Wide = tile::SharedTile<E, Shape::kChunk, Shape::kKeyTile>;
  struct Stage {
    Wide gamma_q, gamma_k, k_tilde;  // scale * Gamma.q,  Gamma.k,  exp(G_C - G).k
    typename ChunkRecord<Variant>::Square t, a_qk;
    float gamma_c[Shape::kKeyTile];  // decay over the chunk
  } stage[Shape::kConfig.stages];
  tile::SharedTile<E, Shape::kChunk, kValueTile> v[2];  // V of a chunk, later its O; a warp owns 16 columns
  struct Announcement {                                 // between producers; alternates, as they may be a chunk apart
    float2 total[Shape::kGroups][Shape::kPairs];        // decay over each group of 16 tokens
    float norm[2][Shape::kChunk];                       // reciprocal norms of q and k
  } announced[2];
};

/// Named barriers; 0 is sync_block. Full(s): producers arrive, consumers wait; empty(s): the reverse.
struct ScanBarrier {
  static constexpr int kProducers = 1;
  static KDA_DEVICE int full(int stage) { return 2 + stage; }
  static KDA_DEVICE int empty(int stage) { return 4 + stage; }
};

template <class Variant>
struct ScanShape : ChunkShape<Variant> {
  static constexpr int kConsumers = kConsumerWarps * 32;
  static constexpr int kProducers = ChunkShape<Variant>::kColumnThreads;
  static constexpr int kThreads = kConsumers + kProducers;
  // With wgmma the consumers take what the producers can spare: 216 * 128 + 144 * 256 <= 64 K registers.
  static constexpr int kConsumerRegisters = 216, kProducerRegisters = 144;
  static_assert(kConsumers * kConsumerRegisters + kProducers * kProducerRegisters <= 65536 ||
                !ChunkShape<Variant>::kConfig.wgmma);
};

template <class Variant>
struct ScanProducer {
  using E = typename Variant::Element;
  using Shape = ScanShape<Variant>;
  using Storage = ScanStorage<Variant>;
  static constexpr int kChunk = Shape::kChunk;

  ChunkFwdParams const& p;
  Storage& s;
  int const thread, group = thread / Shape::kPairs, pair = thread % Shape::kPairs;
  Columns<Variant> columns;
  float norm = 0.f;  // one of the 2 C reciprocal norms, held by the first 2 C threads

  KDA_DEVICE void load(ChunkOfHead const& chunk, ChunkRecord<Variant> const& record) {
    columns.load(p, chunk, group, pair);
    if (thread < 2 * kChunk) norm = thread < kChunk ? record.q_norm[thread] : record.k_norm[thread - kChunk];
  }

  /// Consumes the loaded columns: the decays of this group of tokens, announced to the other groups.
  KDA_DEVICE void announce(ChunkOfHead const& chunk, int parity) {
    columns.decay_from_gate(p, chunk, group, pair);
    auto& out = s.announced[parity];
    out.total[group][pair] = columns.total();
    if (thread < 2 * kChunk) out.norm[thread / kChunk][thread % kChunk] = norm;
    sync_named(ScanBarrier::kProducers, Shape::kProducers);
  }

  KDA_DEVICE void copy_record(ChunkRecord<Variant> const& record, int stage) {
    copy_image(s.stage[stage].t, record.t);
    copy_image(s.stage[stage].a_qk, record.a_qk);
    cp_async_commit();
  }

  KDA_DEVICE void build(int stage, int parity) {
    auto& out = s.stage[stage];
    auto const& in = s.announced[parity];
    float2 before{1.f, 1.f}, after{1.f, 1.f};
#pragma unroll
    for (int i = 0; i < Shape::kGroups; ++i) {
      if (i < group) before = before * in.total[i][pair];
      if (i > group) after = after * in.total[i][pair];
    }
    if (group == 0) {
      float2 const whole = after * in.total[0][pair];
      out.gamma_c[2 * pair] = whole.x;
      out.gamma_c[2 * pair + 1] = whole.y;
    }
    int const row0 = group * kTokensPerThread;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      before = before * columns.decay(j);
      store(out.gamma_q, row0 + j, tile::to_float2<E>(columns.q[j]) * before, p.scale * in.norm[0][row0 + j]);
      store(out.gamma_k, row0 + j, tile::to_float2<E>(columns.k[j]) * before, in.norm[1][row0 + j]);
    }
#pragma unroll
    for (int j = kTokensPerThread - 1; j >= 0; --j) {
      store(out.k_tilde, row0 + j, tile::to_float2<E>(columns.k[j]) * after, in.norm[1][row0 + j]);
      after = after * columns.decay(j);
    }
  }

 private:
  template <class Tile>
  KDA_DEVICE void copy_image(Tile& to, E const* from) {
    constexpr int kPieces = Tile::kRows * Tile::kCols / Tile::kPiece;
    for (int i = thread; i < kPieces; i += Shape::kProducers)
      cp_async_16(to.data + i * Tile::kPiece, from + i * Tile::kPiece);
  }
  KDA_DEVICE void store(typename Storage::Wide& t, int row, float2 x, float factor) {
    tile::store_pair<E>(&t.at(row, 2 * pair), tile::to_pair<E>(x.x * factor, x.y * factor));
  }
};

template <class Variant>
struct ScanConsumer {
  using E = typename Variant::Element;
  using Shape = ScanShape<Variant>;
  using Storage = ScanStorage<Variant>;
  using Stage = typename Storage::Stage;
  static constexpr int kChunk = Shape::kChunk, kKeyTile = Shape::kKeyTile;
  static constexpr int kTokenTiles = kChunk / 8, kKeyTiles = kKeyTile / 8;

  using Products = std::conditional_t<Shape::kConfig.wgmma, tile::WgmmaProducts<E, kChunk, kKeyTile>,
                                      tile::MmaProducts<E, kChunk, kKeyTile>>;

  ChunkFwdParams const& p;
  Storage& s;
  int const warp, value0;                   // this warp's columns of V: value0 + warp * 16 ...
  tile::Accumulator state[kKeyTiles];       // S^T
  tile::Accumulator x[kTokenTiles];         // X^T, then U^T
  tile::Accumulator o[kTokenTiles];         // O^T
  tile::LeftFragment<E> left[kChunk / 16];  // X^T, then U^T, as operand
  Products products;

  /// Starts S^T (Gamma.K)^T and S^T (scale Gamma.Q)^T.
  KDA_DEVICE void start(Stage const& in) { products.start_wide(x, o, state, in.gamma_k, in.gamma_q); }

  /// X^T = V^T - S^T (Gamma.K)^T
  KDA_DEVICE void correct_values(int v_buffer) {
    products.template wait<1>();
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2) {
      tile::Accumulator v0, v1;
      tile::load_transposed<E>(v0, v1, s.v[v_buffer], c * 8, warp * 16);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v0.x[e] -= x[c].x[e];
        v1.x[e] -= x[c + 1].x[e];
      }
      left[c / 2] = tile::left_from<E>(v0, v1);
    }
  }

  /// U^T = X^T T^T, and meanwhile S^T <- S^T Diag(Gamma_C)
  KDA_DEVICE void solve(Stage const& in) {
    products.start_lower(x, left, in.t, false);
    int const lane = lane_index();
#pragma unroll
    for (int d = 0; d < kKeyTiles; ++d) {
      float2 const gamma = *reinterpret_cast<float2 const*>(&in.gamma_c[d * 8 + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) state[d].x[e] *= e % 2 ? gamma.y : gamma.x;
    }
    products.template wait<0>();
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2) left[c / 2] = tile::left_from<E>(x[c], x[c + 1]);
  }

  /// O^T += U^T A_qk^T, left in the place of V, and S^T += U^T K~
  KDA_DEVICE void output_and_advance(Stage const& in, int v_buffer) {
    products.start_lower(o, left, in.a_qk, true);
    products.start_outer(state, left, in.k_tilde);
    products.template wait<1>();
    sync_warp();
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) tile::store_transposed<E>(s.v[v_buffer], c * 8, warp * 16, o[c]);
    sync_warp();
  }
  KDA_DEVICE void finish() { products.template wait<0>(); }

  KDA_DEVICE void load_values(ChunkOfHead const& chunk, int v_buffer) {
    tile_rows<true>(chunk, v_buffer);
    cp_async_commit();
  }
  KDA_DEVICE void store_output(ChunkOfHead const& chunk, int v_buffer) { tile_rows<false>(chunk, v_buffer); }

 private:
  /// Moves this warp's 16 columns of all rows: V to shared memory (zero beyond the tensor) or O from it.
  template <bool kLoad>
  KDA_DEVICE void tile_rows(ChunkOfHead const& chunk, int v_buffer) {
    constexpr int kPieces = int(sizeof(E));      // of 16 bytes, in 16 columns
    constexpr int kPiece = 16 / int(sizeof(E));  // elements
    int const lane = lane_index(), piece = lane % kPieces, col = warp * 16 + piece * kPiece;
    int const live = p.value_dim - value0 - col;  // columns of this piece inside the tensor
    TokenStrides const& strides = kLoad ? p.v_strides : p.o_strides;
    int64_t const first =
        chunk.batch_row * strides.batch + chunk.begin * strides.token + chunk.value_head * strides.head + value0 + col;
#pragma unroll
    for (int row = lane / kPieces; row < kChunk; row += 32 / kPieces) {
      E* shared = &s.v[v_buffer].at(row, col);
      int64_t const at = first + row * strides.token;
      int const count = row < chunk.rows ? (live < kPiece ? live : kPiece) : 0;
      if constexpr (kLoad) load_piece(shared, static_cast<E const*>(p.v) + at, count);
      else store_piece(static_cast<E*>(p.o) + at, shared, count);
    }
  }
  static constexpr int kPieceElements = 16 / int(sizeof(E));
  KDA_DEVICE void load_piece(E* shared, E const* global, int count) {
    if (p.v_pieces_aligned) {
      cp_async_16(shared, count > 0 ? global : static_cast<E const*>(p.v), count > 0 ? 16 : 0);
    } else {
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) shared[i] = i < count ? global[i] : from_float<E>(0.f);
    }
  }
  KDA_DEVICE void store_piece(E* global, E const* shared, int count) {
    if (p.o_pieces_aligned) {
      if (count > 0) *reinterpret_cast<uint4*>(global) = *reinterpret_cast<uint4 const*>(shared);
    } else {
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i)
        if (i < count) global[i] = shared[i];
    }
  }
};

}  // namespace kda
