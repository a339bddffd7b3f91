// The recurrence over chunks. One block per segment (of a sequence that is not split: all of it), value head and 64
// columns of V.
//
// Consumer warps each hold 16 rows of the transposed state S^T (V x K) as accumulators for the whole sequence; every
// product takes its left operand from registers, so the state never travels through shared memory:
//     U^T = (T V)^T - S^T W^T
//     O^T = S^T (scale Gamma.Q)^T + U^T A_qk^T          S^T <- S^T Diag(Gamma_C) + U^T K~
// Where two warps have half of K each, they add up S^T W^T through shared memory, and the first completes the outputs.
// Producer warps bring the records of the next chunks (record.h) and take the outputs away meanwhile. In the backward W
// does not lie in the records but in rows of its own (ChunkRound::w).
//
// The passes differ in what they keep (ScanPass). The gradients of the states run through the same records from the
// last to the first (chunk_bwd/scan.h).
#pragma once
#include "kda/chunk/segments.h"
#include "kda/chunk/state_io.h"
#include "kda/chunk/tile_rows.h"
#include "tile/products.h"

namespace kda {

enum class ScanPass {
  kOutputs,  // the recurrence, with outputs
  kStates,   // the recurrence; S_0 and U of every chunk are kept
  kSummary,  // of a segment: S^T from zero, or, with T V = 0, rows of its transition M from the identity
  kReverse,  // gradients of states, from the last chunk to the first
};

template <class Variant, ScanPass kPass>
struct ScanShape : ChunkShape<Variant> {
  static constexpr ChunkConfig kConfig = Variant::config;
  static constexpr int kKeySlices = kConfig.key_slices, kSliceTile = kConfig.key_tile / kKeySlices;
  static constexpr bool kIsSummary = kPass == ScanPass::kSummary;
  static constexpr bool kOfBackward = kPass == ScanPass::kStates || kPass == ScanPass::kReverse;
  static constexpr int kConsumers = kConsumerWarps * kKeySlices * 32, kProducers = kIsSummary ? 32 : 128;
  static constexpr int kThreads = kConsumers + kProducers;
  /// Summaries: two blocks per SM, each of which waits for its own products most of the time.
  static constexpr int kStages = !kIsSummary || kConfig.stages < 2 ? kConfig.stages : 2;
  static constexpr int kBlocksPerSm = !kIsSummary || kConfig.key_tile > 128 || sizeof(typename Variant::Element) == 4
                                          ? 1
                                          : 2;
  /// sm_90: bulk copies, and asynchronous products: the output of a chunk is finished while the next one starts.
  static constexpr bool kAsync = kConfig.wgmma;
  static_assert(kKeySlices == 1 || (kKeySlices == 2 && kConfig.chunk == 16 && !kAsync));
};

template <class Values, int kWarps, ScanPass kPass>
struct ScanResults {};
template <class Values, int kWarps>
struct ScanResults<Values, kWarps, ScanPass::kOutputs> {
  Values o[2];  // of alternate chunks; a consumer warp owns 16 columns
};
template <class Values, int kWarps>
struct ScanResults<Values, kWarps, ScanPass::kSummary> {
  bool remembers[kWarps];  // rows of M: any of the warp's, at the last check
};

struct NoFlags {};

/// Sums over half of K, of alternate chunks, lane by lane. A chain of bases: nvcc reaches a second base by a conversion
/// that hides that this is shared memory.
template <class Results, int kTokenTiles, int kKeySlices>
struct ScanPartials : Results {
  struct {
    float4 x[kKeySlices][kTokenTiles][32];  // S^T W^T
    float4 o[kTokenTiles][32];              // O^T of the second slice
  } partials[2][kConsumerWarps];
};
template <class Results, int kTokenTiles>
struct ScanPartials<Results, kTokenTiles, 1> : Results {};

template <class Variant, ScanPass kPass, class Shape = ScanShape<Variant, kPass>>
struct ScanStorage : ScanPartials<ScanResults<typename ChunkTransition<Variant>::Values, Shape::kConsumers / 32, kPass>,
                                  Shape::kChunk / 8, Shape::kKeySlices> {
  static constexpr bool kWhole = kPass == ScanPass::kOutputs || kPass == ScanPass::kReverse;
  using Record = std::conditional_t<kWhole, ChunkRecord<Variant>, ChunkTransition<Variant>>;
  /// A base, since members of no size would take an alignment each.
  struct Stage : std::conditional_t<kPass == ScanPass::kStates, ChunkFlags<Shape::kChunk>, NoFlags> {
    Record record;
    typename Record::Values u;  // T V; in reverse: dO
  } stage[Shape::kStages];
  Mbarrier full[Shape::kStages];  // wgmma variants: what bulk copies bring has arrived
};

/// Named barriers, all of consumers and producers; 0 is sync_block.
template <class Variant, ScanPass kPass>
struct ScanBarrier {
  using Shape = ScanShape<Variant, kPass>;
  static constexpr int kStages = Shape::kStages;
  static KDA_DEVICE int empty(int stage) { return 1 + stage; }           // consumers arrive, producers wait
  static KDA_DEVICE int full(int stage) { return 1 + kStages + stage; }  // the reverse
  static KDA_DEVICE int output_full(int buffer) {
    return 1 + 2 * kStages + buffer;
  }  // consumers arrive, producers wait
  static KDA_DEVICE int output_empty(int buffer) { return 3 + 2 * kStages + buffer; }  // the reverse
  static KDA_DEVICE void wait(int barrier) { sync_named(barrier, Shape::kThreads); }
  static KDA_DEVICE void arrive(int barrier) { arrive_named(barrier, Shape::kThreads); }
  static constexpr int kConsumers = 5 + 2 * kStages;  // of the consumers alone
  /// Of the warps that share rows.
  static KDA_DEVICE void add_slices(int rows) { sync_named(kConsumers + 1 + rows, Shape::kKeySlices * 32); }
  static_assert(kConsumers + (Shape::kKeySlices > 1 ? kConsumerWarps : 0) < 16);
};

/// Every how many chunks it is asked whether a segment has forgotten what it began from. At least as many as there are
/// stages: a check then is read by all before the next one is written.
inline constexpr int kCheckInterval = 4;
/// Rows of M count as zero once all their entries are below the smallest normal fp32 number: chunks map rows to rows
/// that are no longer (docs/mathematics.md, section 4: beta |k|^2 <= 2), so that the rest cannot bring them back, and
/// of a state S_start at most sqrt(K) 2^-126 |S_start| is left out.
inline constexpr float kNegligible = 1.17549435e-38f;

template <class Variant, ScanPass kPass>
struct ScanProducer {
  using E = typename Variant::Element;
  using Shape = ScanShape<Variant, kPass>;
  using Barrier = ScanBarrier<Variant, kPass>;
  static constexpr bool kLoadsValues = kPass != ScanPass::kReverse;
  ChunkCall const& p;
  ScanStorage<Variant, kPass>& s;
  int const value0;   // negative: rows of M, no T V
  Rows const stream;  // O, which they store; in reverse dO, which they load
  int const thread = thread_index() - Shape::kConsumers;
  int64_t seen = 0;  // so many records of the round are known to be there

  /// Starts the copy of a chunk, once its record is there, to a stage that is free. `remaining`: chunks from it on.
  KDA_DEVICE void load(int64_t cell, int value_head, int stage, int64_t remaining) {
    ChunkRecordAt<Variant> const from(p, cell, value_head);
    if (kPass == ScanPass::kOutputs && p.progress && cell >= seen) wait_for_record(cell, value_head, remaining);
    auto& to = s.stage[stage];
    constexpr int kSkipped = Shape::kOfBackward ? sizeof(to.record.w) : 0, kBytes = sizeof(to.record) - kSkipped;
    bool const has_values = kLoadsValues && (!Shape::kIsSummary || value0 >= 0);
    if constexpr (!Shape::kAsync) {  // without what nobody has written, between the tiles
      using Transition = ChunkTransition<Variant>;
      constexpr int kOutputBytes = ScanStorage<Variant, kPass>::kWhole ? ChunkRecord<Variant>::kOutputBytes : 0;
      copy<Transition::kBytes - kSkipped, int(sizeof(Transition)) - Transition::kBytes>(
          first_of(to.record), first_of(from.record()), Transition::kBytes - kSkipped + kOutputBytes);
      if (has_values) copy(&to.u, &from.values(value0 / kValueTile), sizeof(to.u));
      cp_async_commit();
    } else if (thread == 0) {
      mbarrier_arrive_expect_tx(s.full[stage], uint32_t(kBytes + (has_values ? sizeof(to.u) : 0)));
      bulk_load(first_of(to.record), first_of(from.record()), kBytes, s.full[stage]);
      if (has_values) bulk_load(&to.u, &from.values(value0 / kValueTile), sizeof(to.u), s.full[stage]);
    }
  }
  /// Once chunk i has been consumed: whether no more is needed. As ScanConsumer::has_forgotten.
  KDA_DEVICE bool is_done(int64_t i) const {
    if constexpr (!Shape::kIsSummary) return false;
    else {
      if (value0 >= 0 || i % kCheckInterval) return false;
      bool remembers = false;
      if (thread == 0 || !Shape::kAsync)  // what they do next orders their reads before the next check
        for (bool warp : s.remembers) remembers = remembers || warp;
      return !warp_any(remembers);
    }
  }
  /// In the backward, what lies in rows of the chunk's tokens: W, and dO in reverse. To be called before `load`.
  KDA_DEVICE void load_rows(ChunkOfHead const& chunk, int stage) {
    static_assert(Shape::kOfBackward);
    auto& to = s.stage[stage];
    tile_rows<E>(p.w, chunk, chunk.value_head, 0, p.key_dim)
        .template load<Shape::kKeyTile>(to.record.w, 0, thread, Shape::kProducers);
    if constexpr (kPass == ScanPass::kReverse)
      tile_rows<E>(stream, chunk, chunk.value_head, value0, p.value_dim - value0)
          .template load<kValueTile>(to.u, 0, thread, Shape::kProducers);
    if constexpr (Shape::kAsync) cp_async_commit();
  }
  /// The chunk before the last kPending ones. Bulk copies announce themselves.
  template <int kPending = 0>
  KDA_DEVICE void announce(int stage) {
    if constexpr (!Shape::kAsync || Shape::kOfBackward) {
      cp_async_wait<kPending>();
      if constexpr (Shape::kAsync) fence_proxy_async();  // wgmma reads W
      Barrier::arrive(Barrier::full(stage));
    }
  }
  /// The record of a chunk that has been consumed may be written over by the next round.
  KDA_DEVICE void free_record(int64_t cell, int value_head) {
    if (p.progress && p.more_rounds && thread == 0)
      raise_flag_after_reads(progress_of_record(p, cell, value_head).freed, 1);
  }
  KDA_DEVICE void store_output(ChunkOfHead const& chunk, int buffer, bool again) {
    Barrier::wait(Barrier::output_full(buffer));
    tile_rows<E>(stream, chunk, chunk.value_head, value0, p.value_dim - value0)
        .template store<kValueTile>(s.o[buffer], 0, thread, Shape::kProducers);
    if (again) Barrier::arrive(Barrier::output_empty(buffer));
  }

 private:
  /// Where that begins in a record which is copied as one run of bytes.
  template <class Record>
  static KDA_DEVICE auto* first_of(Record& record) {
    return Shape::kOfBackward ? &record.k_tilde : &record.w;
  }
  /// Every warp that copies, for itself. Fences would hold up the copies on their way: one for all that is there.
  KDA_DEVICE void wait_for_record(int64_t cell, int value_head, int64_t remaining) {
    if (Shape::kAsync && thread >= 32) return;
    int const lane = lane_index();
    if (lane == 0) wait_flag(progress_of_record(p, cell, value_head).ready, p.round_index + 1);
    sync_warp();
    bool const ready =
        lane < remaining && flag_reached(progress_of_record(p, cell + lane, value_head).ready, p.round_index + 1);
    seen = cell + warp_count_leading(ready);
    sync_warp();  // what one lane has seen of its record, all have
    if constexpr (Shape::kAsync) fence_proxy_async_global();
  }
  /// All but a gap of kGap bytes behind the first kBefore.
  template <int kBefore = 0, int kGap = 0>
  KDA_DEVICE void copy(void* to, void const* from, int bytes) {
    for (int i = thread * 16; i < bytes; i += Shape::kProducers * 16) {
      int const at = i < kBefore ? i : i + kGap;
      cp_async_16(static_cast<char*>(to) + at, static_cast<char const*>(from) + at);
    }
  }
};

template <class Variant, ScanPass kPass>
struct ScanConsumer {
  using E = typename Variant::Element;
  using Shape = ScanShape<Variant, kPass>;
  using Barrier = ScanBarrier<Variant, kPass>;
  using Storage = ScanStorage<Variant, kPass>;
  static constexpr bool kOutputs = kPass == ScanPass::kOutputs;
  using Stage = typename Storage::Stage;
  static constexpr int kChunk = Shape::kChunk, kKeySlices = Shape::kKeySlices, kSliceTile = Shape::kSliceTile;
  static constexpr int kTokenTiles = kChunk / 8, kKeyTiles = kSliceTile / 8;

  using Products = std::conditional_t<Shape::kAsync, tile::WgmmaProducts<E, kChunk, kSliceTile>,
                                      tile::MmaProducts<E, kChunk, kSliceTile>>;

  Storage& s;
  int const warp;
  bool const has_values;                    // else T V = 0
  tile::Accumulator state[kKeyTiles];       // S^T
  tile::Accumulator x[kTokenTiles];         // S^T W^T; of kStates, after a step, U^T
  tile::Accumulator o[kTokenTiles];         // O^T
  tile::LeftFragment<E> left[kChunk / 16];  // U^T, as operand
  Products products;

  KDA_DEVICE int row() const { return warp % kConsumerWarps * 16; }  // of S^T in the tile: 16 columns of V
  KDA_DEVICE int key() const { return kKeySlices == 1 ? 0 : warp / kConsumerWarps * kSliceTile; }
  KDA_DEVICE bool completes_output() const { return kKeySlices == 1 || warp < kConsumerWarps; }
  KDA_DEVICE StateSlice slice(int row0) const { return {row0 + row(), key(), Shape::kKeyTile}; }

  KDA_DEVICE void wait_for_record(int stage, uint32_t parity) {
    if constexpr (Shape::kAsync) mbarrier_wait(s.full[stage], parity);
    if constexpr (!Shape::kAsync || Shape::kOfBackward) Barrier::wait(Barrier::full(stage));
  }

  /// One chunk, whose output is then in `o`. Nothing is on its way at the end: ptxas runs wgmmas one by one where they
  /// are pending across a condition.
  KDA_DEVICE void step(int stage, uint32_t parity) {
    wait_for_record(stage, parity);
    Stage const& in = s.stage[stage];
    start(in);
    products.template wait<kOutputs ? 1 : 0>();
    if constexpr (kKeySlices > 1) add_slices((stage + Shape::kStages * int(parity)) % 2);
    correct_values(in);
    if constexpr (kPass == ScanPass::kStates)
      if (in.has_small_beta) take_shares(in.beta_share);
    advance(in);
  }

  /// O of a chunk for the producers.
  KDA_DEVICE void hand_over_output(int buffer) {
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2)
      if (completes_output()) tile::store_transposed<E, Shape::kAsync>(s.o[buffer], c * 8, row(), o[c], o[c + 1]);
    Barrier::arrive(Barrier::output_full(buffer));
  }

  /// Whether all rows of the block, of M, are negligible (also where the answer is nan: they are not).
  KDA_DEVICE bool has_forgotten() {
    bool remembers = false;
#pragma unroll
    for (int d = 0; d < kKeyTiles; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) remembers = remembers || !(fabsf(state[d].x[e]) < kNegligible);
    remembers = warp_any(remembers);
    if (lane_index() == 0) s.remembers[warp] = remembers;
    sync_named(Barrier::kConsumers, Shape::kConsumers);
    for (bool other : s.remembers) remembers = remembers || other;
    return !remembers;
  }

 protected:
  /// Starts S^T W^T and then S^T (scale Gamma.Q)^T, both from a copy of the state, which decays meanwhile.
  KDA_DEVICE void start(Stage const& in) {
    products.read(state);
    if constexpr (Shape::kAsync) decay(in);
    auto const& w = in.record.w.template columns<kSliceTile>(key());
    if constexpr (kOutputs) products.start_rows(state, x, w, o, in.record.gamma_q.template columns<kSliceTile>(key()));
    else products.start_rows(state, x, w);
    if constexpr (!Shape::kAsync) decay(in);
  }

  static KDA_DEVICE float4 to_float4(tile::Accumulator const& a) { return {a.x[0], a.x[1], a.x[2], a.x[3]}; }
  static KDA_DEVICE void add(tile::Accumulator& sum, float4 const& a) {
    sum.x[0] += a.x, sum.x[1] += a.y, sum.x[2] += a.z, sum.x[3] += a.w;
  }
  /// From sums over half of K to sums over all of it. Both warps come to the same x, bit by bit.
  KDA_DEVICE void add_slices(int buffer) {
    auto& partial = s.partials[buffer][warp % kConsumerWarps];
    int const lane = lane_index(), mine = warp / kConsumerWarps;
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      partial.x[mine][c][lane] = to_float4(x[c]);
      if (kOutputs && !completes_output()) partial.o[c][lane] = to_float4(o[c]);
    }
    Barrier::add_slices(warp % kConsumerWarps);  // and so the other has read the sums of two chunks ago
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      add(x[c], partial.x[mine ^ 1][c][lane]);
      if (kOutputs && completes_output()) add(o[c], partial.o[c][lane]);
    }
  }

  /// U^T = (T V)^T - S^T W^T
  KDA_DEVICE void correct_values(Stage const& in) {
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2) {
      tile::Accumulator v0{}, v1{};
      if (!Shape::kIsSummary || has_values) tile::load_transposed<E>(v0, v1, in.u, c * 8, row());
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v0.x[e] -= x[c].x[e];
        v1.x[e] -= x[c + 1].x[e];
      }
      left[c / 2] = tile::left_from<E>(v0, v1);
      if constexpr (kPass == ScanPass::kStates) x[c] = v0, x[c + 1] = v1;
    }
  }

  /// S^T += U^T K~ and O^T += U^T A_qk^T.
  KDA_DEVICE void advance(Stage const& in) {
    products.start_outer(state, left, in.record.k_tilde.template columns<kSliceTile>(key()));
    if constexpr (kOutputs)
      if (completes_output()) products.start_lower(o, left, in.record.a_qk);
    products.template wait<0>();
  }

  /// U as it is, token by token, for the state.
  KDA_DEVICE void take_shares(float const* shares) {
#pragma unroll
    for (int c = 0; c < kTokenTiles; c += 2) {
      tile::Accumulator u[2] = {x[c], x[c + 1]};
#pragma unroll
      for (int e = 0; e < 8; ++e) u[e / 4].x[e % 4] *= shares[(c + e / 4) * 8 + lane_index() % 4 * 2 + e % 2];
      left[c / 2] = tile::left_from<E>(u[0], u[1]);
    }
  }

  KDA_DEVICE void decay(Stage const& in) {
    int const lane = lane_index();
#pragma unroll
    for (int d = 0; d < kKeyTiles; ++d) {
      float2 const gamma = *reinterpret_cast<float2 const*>(&in.record.gamma_c[key() + d * 8 + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) state[d].x[e] *= e % 2 ? gamma.y : gamma.x;
    }
  }
};

template <class Variant, ScanPass kPass>
KDA_DEVICE void init_scan(ScanStorage<Variant, kPass>& s) {
  if constexpr (ScanShape<Variant, kPass>::kAsync) {
    if (thread_index() == 0) {
      for (Mbarrier& full : s.full) mbarrier_init(full, 1);
      fence_mbarrier_init();
    }
    sync_block();
  }
}
/// Of a shuffle, so that the compiler sees whole warps on either side.
template <class Variant, ScanPass kPass>
KDA_DEVICE bool is_consumer() {
  return shuffle(thread_index() / ScanShape<Variant, kPass>::kConsumers, 0) == 0;
}

}  // namespace kda
