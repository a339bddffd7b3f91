// The recurrence over chunks. One block per sequence, value head and 64 columns of V.
//
// Consumer warps each hold 16 rows of the transposed state S^T (V x K) as accumulators for the whole sequence; every
// product takes its left operand from registers, so the state never travels through shared memory:
//     U^T = (T V)^T - S^T W^T
//     O^T = S^T (scale Gamma.Q)^T + U^T A_qk^T          S^T <- S^T Diag(Gamma_C) + U^T K~
// Producer warps bring the records of the next chunks (workspace.h) meanwhile.
#pragma once
#include "kda/chunk_fwd/state_io.h"
#include "kda/chunk_fwd/value_rows.h"
#include "kda/chunk_fwd/workspace.h"
#include "tile/products.h"

namespace kda {

template <class Variant>
struct ScanStorage {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Record = ChunkRecord<Variant>;
  struct Stage {
    typename Record::Wide w, gamma_q, k_tilde;
    typename Record::Square a_qk;
    float gamma_c[Shape::kKeyTile];
  } stage[Shape::kConfig.stages];
  tile::SharedTile<E, Shape::kChunk, kValueTile> v[2];  // T V of a chunk, later its O; a warp owns 16 columns
};

template <class Variant>
struct ScanShape : ChunkShape<Variant> {
  static constexpr int kConsumers = kConsumerWarps * 32;
  static constexpr int kProducers = 128;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kStages = ChunkShape<Variant>::kConfig.stages;
  /// Asynchronous products: the output of a chunk is finished while the next one starts, and its stage freed then.
  static constexpr bool kOverlap = ChunkShape<Variant>::kConfig.wgmma;
  static_assert(kStages >= (kOverlap ? 3 : 1));
};

/// Named barriers; 0 is sync_block. Full(s): producers arrive, consumers wait; empty(s): the reverse.
template <class Variant>
struct ScanBarrier {
  static KDA_DEVICE int full(int stage) { return 1 + stage; }
  static KDA_DEVICE int empty(int stage) { return 1 + ScanShape<Variant>::kStages + stage; }
};

template <class Variant>
struct ScanProducer {
  using Shape = ScanShape<Variant>;
  using Storage = ScanStorage<Variant>;
  using Record = ChunkRecord<Variant>;
  Storage& s;
  int const thread = thread_index() - Shape::kConsumers;

  KDA_DEVICE void start(Record const& record, int stage) {
    auto& to = s.stage[stage];
    copy(to.w.data, record.w);
    copy(to.gamma_q.data, record.gamma_q);
    copy(to.k_tilde.data, record.k_tilde);
    copy(to.a_qk.data, record.a_qk);
    copy(to.gamma_c, record.gamma_c);
    cp_async_commit();
  }
  /// What the consumers read of it once all but the last kPending chunks have arrived.
  template <int kPending>
  KDA_DEVICE void finish(int stage) {
    cp_async_wait<kPending>();
    if constexpr (Shape::kConfig.wgmma) fence_proxy_async();
    arrive_named(ScanBarrier<Variant>::full(stage), Shape::kThreads);
  }

 private:
  template <class T, int kCount>
  KDA_DEVICE void copy(T* to, T const (&from)[kCount]) {
    constexpr int kPiece = 16 / int(sizeof(T));
#pragma unroll
    for (int i = thread; i < kCount / kPiece; i += Shape::kProducers) cp_async_16(to + i * kPiece, from + i * kPiece);
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
  tile::Accumulator x[kTokenTiles];         // S^T W^T
  tile::Accumulator o[kTokenTiles];         // O^T
  tile::LeftFragment<E> left[kChunk / 16];  // U^T, as operand
  Products products;

  /// Starts S^T W^T; what was started before goes on.
  KDA_DEVICE void start_correction(Stage const& in) { products.start_rows(x, state, in.w); }

  /// Starts S^T (scale Gamma.Q)^T; then the state decays: the products have their own copy of it.
  KDA_DEVICE void start_output(Stage const& in) {
    products.start_rows(o, state, in.gamma_q);
    int const lane = lane_index();
#pragma unroll
    for (int d = 0; d < kKeyTiles; ++d) {
      float2 const gamma = *reinterpret_cast<float2 const*>(&in.gamma_c[d * 8 + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) state[d].x[e] *= e % 2 ? gamma.y : gamma.x;
    }
  }

  /// U^T = (T V)^T - S^T W^T
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

  /// S^T += U^T K~, done at the end; O^T += U^T A_qk^T, still on its way.
  KDA_DEVICE void advance(Stage const& in) {
    products.start_outer(state, left, in.k_tilde);
    products.start_lower(o, left, in.a_qk);
    products.template wait<1>();
  }

  KDA_DEVICE void load_values(ChunkOfHead const& chunk, int v_buffer) {
    value_rows_of_o<E>(p, chunk, value0).template load<16>(s.v[v_buffer], warp * 16, lane_index(), 32);
    cp_async_commit();
  }
  /// O of a chunk, whose products are complete, by way of the buffer in which T V was.
  KDA_DEVICE void store_output(ChunkOfHead const& chunk, int v_buffer) {
    sync_warp();
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) tile::store_transposed<E>(s.v[v_buffer], c * 8, warp * 16, o[c]);
    sync_warp();
    value_rows_of_o<E>(p, chunk, value0).template store<16>(s.v[v_buffer], warp * 16, lane_index(), 32);
    sync_warp();
  }
};

}  // namespace kda
