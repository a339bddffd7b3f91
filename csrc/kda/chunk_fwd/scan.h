// The recurrence over chunks. One block per sequence, value head and 64 columns of V.
//
// Consumer warps each hold 16 rows of the transposed state S^T (V x K) as accumulators for the whole sequence; every
// product takes its left operand from registers, so the state never travels through shared memory:
//     U^T = (T V)^T - S^T W^T
//     O^T = S^T (scale Gamma.Q)^T + U^T A_qk^T          S^T <- S^T Diag(Gamma_C) + U^T K~
// Helper warps bring the records of the next chunks (workspace.h) and take the outputs away meanwhile.
#pragma once
#include "kda/chunk_fwd/state_io.h"
#include "kda/chunk_fwd/tile_rows.h"
#include "kda/chunk_fwd/workspace.h"
#include "tile/products.h"

namespace kda {

template <class Variant>
struct ScanStorage {
  using Record = ChunkRecord<Variant>;
  struct Stage {
    Record record;
    typename Record::Values u;  // T V
  } stage[Variant::config.stages];
  typename Record::Values o[2];           // of alternate chunks; a consumer warp owns 16 columns
  Mbarrier full[Variant::config.stages];  // wgmma variants: the record has arrived
};

template <class Variant>
struct ScanShape : ChunkShape<Variant> {
  static constexpr int kConsumers = kConsumerWarps * 32, kHelpers = 128, kThreads = kConsumers + kHelpers;
  static constexpr int kStages = ChunkShape<Variant>::kConfig.stages;
  /// sm_90: bulk copies, and asynchronous products: the output of a chunk is finished while the next one starts.
  static constexpr bool kAsync = ChunkShape<Variant>::kConfig.wgmma;
};

/// Named barriers, all of consumers and helpers; 0 is sync_block.
template <class Variant>
struct ScanBarrier {
  static constexpr int kStages = ScanShape<Variant>::kStages;
  static KDA_DEVICE int empty(int stage) { return 1 + stage; }                         // consumers arrive, helpers wait
  static KDA_DEVICE int full(int stage) { return 1 + kStages + stage; }                // the reverse
  static KDA_DEVICE int output_full(int buffer) { return 1 + 2 * kStages + buffer; }   // consumers arrive, helpers wait
  static KDA_DEVICE int output_empty(int buffer) { return 3 + 2 * kStages + buffer; }  // the reverse
  static KDA_DEVICE void wait(int barrier) { sync_named(barrier, ScanShape<Variant>::kThreads); }
  static KDA_DEVICE void arrive(int barrier) { arrive_named(barrier, ScanShape<Variant>::kThreads); }
  static_assert(4 + 2 * kStages < 16);
};

template <class Variant>
struct ScanHelper {
  using E = typename Variant::Element;
  using Shape = ScanShape<Variant>;
  using Barrier = ScanBarrier<Variant>;
  ChunkFwdParams const& p;
  ScanStorage<Variant>& s;
  int const value0, thread = thread_index() - Shape::kConsumers;

  /// Starts the copy of chunk i, whose stage is free.
  KDA_DEVICE void load(ChunkRecordAt<Variant> from, int stage) {
    auto& to = s.stage[stage];
    auto const& values = from.values(value0 / kValueTile);
    if constexpr (!Shape::kAsync) {
      copy(&to.record, &from.record(), sizeof(to.record));
      copy(&to.u, &values, sizeof(to.u));
      cp_async_commit();
    } else if (thread == 0) {
      mbarrier_arrive_expect_tx(s.full[stage], uint32_t(sizeof(to.record) + sizeof(to.u)));
      bulk_load(&to.record, &from.record(), sizeof(to.record), s.full[stage]);
      bulk_load(&to.u, &values, sizeof(to.u), s.full[stage]);
    }
  }
  /// Bulk copies announce themselves.
  KDA_DEVICE void announce(int stage) {
    if constexpr (!Shape::kAsync) {
      cp_async_wait<0>();
      Barrier::arrive(Barrier::full(stage));
    }
  }
  KDA_DEVICE void store_output(ChunkOfHead const& chunk, int buffer, bool again) {
    Barrier::wait(Barrier::output_full(buffer));
    tile_rows<E>(p.o, p.o_strides, p.o_pieces_aligned, chunk, chunk.value_head, value0, p.value_dim - value0)
        .template store<kValueTile>(s.o[buffer], 0, thread, Shape::kHelpers);
    if (again) Barrier::arrive(Barrier::output_empty(buffer));
  }

 private:
  KDA_DEVICE void copy(void* to, void const* from, int bytes) {
    for (int i = thread * 16; i < bytes; i += Shape::kHelpers * 16)
      cp_async_16(static_cast<char*>(to) + i, static_cast<char const*>(from) + i);
  }
};

template <class Variant>
struct ScanConsumer {
  using E = typename Variant::Element;
  using Shape = ScanShape<Variant>;
  using Barrier = ScanBarrier<Variant>;
  using Storage = ScanStorage<Variant>;
  using Stage = typename Storage::Stage;
  static constexpr int kChunk = Shape::kChunk, kKeyTile = Shape::kKeyTile;
  static constexpr int kTokenTiles = kChunk / 8, kKeyTiles = kKeyTile / 8;

  using Products = std::conditional_t<Shape::kAsync, tile::WgmmaProducts<E, kChunk, kKeyTile>,
                                      tile::MmaProducts<E, kChunk, kKeyTile>>;

  Storage& s;
  int const warp;                           // its columns of V in the tile: warp * 16 ...
  tile::Accumulator state[kKeyTiles];       // S^T
  tile::Accumulator x[kTokenTiles];         // S^T W^T
  tile::Accumulator o[kTokenTiles];         // O^T
  tile::LeftFragment<E> left[kChunk / 16];  // U^T, as operand
  Products products;

  KDA_DEVICE void wait_for_record(int stage, uint32_t parity) {
    if constexpr (Shape::kAsync) mbarrier_wait(s.full[stage], parity);
    else Barrier::wait(Barrier::full(stage));
  }

  /// Starts S^T W^T and then S^T (scale Gamma.Q)^T, both from a copy of the state, which decays meanwhile.
  KDA_DEVICE void start(Stage const& in) {
    products.read(state);
    if constexpr (Shape::kAsync) decay(in);
    products.start_rows(x, state, in.record.w);
    products.start_rows(o, state, in.record.gamma_q);
    if constexpr (!Shape::kAsync) decay(in);
  }

  /// U^T = (T V)^T - S^T W^T
  KDA_DEVICE void correct_values(Stage const& in) {
    products.template wait<1>();
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2) {
      tile::Accumulator v0, v1;
      tile::load_transposed<E>(v0, v1, in.u, c * 8, warp * 16);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v0.x[e] -= x[c].x[e];
        v1.x[e] -= x[c + 1].x[e];
      }
      left[c / 2] = tile::left_from<E>(v0, v1);
    }
  }

  /// S^T += U^T K~ and O^T += U^T A_qk^T. Nothing is on its way at the end: ptxas runs wgmmas one by one where they are
  /// pending across a condition.
  KDA_DEVICE void advance(Stage const& in) {
    products.start_outer(state, left, in.record.k_tilde);
    products.start_lower(o, left, in.record.a_qk);
    products.template wait<0>();
  }

  /// O of a chunk for the helpers.
  KDA_DEVICE void hand_over_output(int buffer) {
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2)
      tile::store_transposed<E, Shape::kAsync>(s.o[buffer], c * 8, warp * 16, o[c], o[c + 1]);
    Barrier::arrive(Barrier::output_full(buffer));
  }

 private:
  KDA_DEVICE void decay(Stage const& in) {
    int const lane = lane_index();
#pragma unroll
    for (int d = 0; d < kKeyTiles; ++d) {
      float2 const gamma = *reinterpret_cast<float2 const*>(&in.record.gamma_c[d * 8 + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) state[d].x[e] *= e % 2 ? gamma.y : gamma.x;
    }
  }
};

}  // namespace kda
