// The kernels of the chunkwise forward: prepare (all chunks at once), then scan (chunk after chunk).
#pragma once
#include "kda/chunk_fwd/prepare.h"
#include "kda/chunk_fwd/scan.h"

namespace kda {

/// Chunk `i` of a sequence, for one value head.
KDA_DEVICE ChunkOfHead chunk_of_head(ChunkFwdParams const& p, Sequence const& sequence, int64_t i, int value_head) {
  int64_t const first = i * p.plan.chunk, left = sequence.length - first;
  return {sequence.batch_row, sequence.begin + first, int32_t(left < p.plan.chunk ? left : p.plan.chunk),
          value_head / (p.value_heads / p.heads), value_head};
}

template <class Variant>
KDA_GLOBAL void __launch_bounds__(Prepare<Variant>::kThreads, Prepare<Variant>::kBlocksPerSm)
    chunk_fwd_prepare_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(PrepareStorage<Variant>, storage);
  int64_t const slot = blockIdx.x;
  int const value_head = blockIdx.y;
  Sequence const sequence = p.plan.sequence(p.plan.sequence_of_slot(slot));
  int64_t const i = slot - sequence.first_slot;
  if (i < 0 || i >= p.plan.chunks_of(sequence.length)) return;  // a slot that no chunk uses

  Prepare<Variant> prepare{{p, *storage, chunk_record<Variant>(p.workspace, slot, p.value_heads, value_head),
                            chunk_of_head(p, sequence, i, value_head)}};
  prepare.load_chunk();
  prepare.normalise();
  prepare.scores();
  prepare.solve();
  prepare.apply();
}

/// The scan's producer warps: record after record into the next free stage.
template <class Variant>
KDA_DEVICE void produce_chunks(ChunkFwdParams const& p, ScanStorage<Variant>& s, Sequence const& sequence,
                               int value_head) {
  using Shape = ScanShape<Variant>;
  // Copies on their way while the producers wait for a stage: its chunk is freed only after the chunk behind it (or,
  // with overlap, the one after that) has been announced.
  constexpr int kStages = Shape::kStages, kPending = kStages - (Shape::kOverlap ? 2 : 1);
  ScanProducer<Variant> producer{s};
  int64_t const chunks = p.plan.chunks_of(sequence.length);
  for (int64_t i = 0; i < chunks; ++i) {
    if (i > kPending) producer.template finish<kPending>(int((i - 1 - kPending) % kStages));
    int const stage = int(i % kStages);
    if (i >= kStages) sync_named(ScanBarrier<Variant>::empty(stage), Shape::kThreads);
    producer.start(chunk_record<Variant>(p.workspace, sequence.first_slot + i, p.value_heads, value_head), stage);
  }
  for (int64_t i = chunks > kPending ? chunks - 1 - kPending : 0; i < chunks; ++i)
    producer.template finish<0>(int(i % kStages));
}

/// The scan's consumer warps: the recurrence.
template <class Variant>
KDA_DEVICE void consume_chunks(ChunkFwdParams const& p, ScanStorage<Variant>& s, Sequence const& sequence, int n,
                               int value_head, int value0) {
  using Shape = ScanShape<Variant>;
  constexpr int kStages = Shape::kStages, kChunk = Shape::kChunk;
  int const warp = thread_index() / 32, value = value0 + warp * 16;
  ScanConsumer<Variant> consumer{p, s, warp, value0};
  load_state(consumer.state, initial_state_at(p, n, value_head), p, value);

  int64_t const chunks = p.plan.chunks_of(sequence.length);
  int64_t const first_kept = first_chunk_state(p, n);
  auto const chunk_at = [&](int64_t i) { return chunk_of_head(p, sequence, i, value_head); };
  auto const finish_output = [&](int64_t i) {
    consumer.store_output(chunk_at(i), int(i % 2));
    if (i + kStages < chunks) arrive_named(ScanBarrier<Variant>::empty(int(i % kStages)), Shape::kThreads);
  };
  if (chunks) consumer.load_values(chunk_at(0), 0);
  for (int64_t i = 0; i < chunks; ++i) {
    auto const& stage = s.stage[i % kStages];
    keep_states(consumer.state, p, n, first_kept, i * kChunk, value_head, value);
    consumer.products.read(consumer.state);
    sync_named(ScanBarrier<Variant>::full(int(i % kStages)), Shape::kThreads);
    consumer.start_correction(stage);
    if (Shape::kOverlap && i > 0) {
      consumer.products.template wait<1>();
      finish_output(i - 1);
    }
    cp_async_wait<0>();
    sync_warp();
    if (i + 1 < chunks) consumer.load_values(chunk_at(i + 1), int((i + 1) % 2));
    consumer.start_output(stage);
    consumer.correct_values(int(i % 2));
    consumer.advance(stage);
    if (!Shape::kOverlap) finish_output(i);
  }
  consumer.products.template wait<0>();
  if (Shape::kOverlap && chunks) finish_output(chunks - 1);
  finish_states(consumer.state, p, n, sequence.length, value_head, value);
}

template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant>::kThreads, 1) chunk_fwd_scan_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(ScanStorage<Variant>, storage);
  int const n = blockIdx.x, value_head = blockIdx.y, value0 = blockIdx.z * kValueTile;
  Sequence const sequence = p.plan.sequence(n);
  if (thread_index() < ScanShape<Variant>::kConsumers)
    consume_chunks<Variant>(p, *storage, sequence, n, value_head, value0);
  else produce_chunks<Variant>(p, *storage, sequence, value_head);
}

}  // namespace kda
