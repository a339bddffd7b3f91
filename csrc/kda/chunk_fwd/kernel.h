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

  Prepare<Variant> prepare(p, *storage, chunk_of_head(p, sequence, i, value_head));
  prepare.load_chunk();
  prepare.dot_products();
  prepare.scores();
  prepare.solve();
  prepare.store(chunk_record<Variant>(p.workspace, slot, p.value_heads, value_head));
}

/// The scan's producer warps: chunk after chunk into the next free stage, global loads one chunk ahead.
template <class Variant>
KDA_DEVICE void produce_chunks(ChunkFwdParams const& p, ScanStorage<Variant>& s, Sequence const& sequence,
                               int value_head) {
  using Shape = ScanShape<Variant>;
  constexpr int kStages = Shape::kConfig.stages;
  ScanProducer<Variant> producer{p, s, thread_index() - Shape::kConsumers};
  auto const record = [&](int64_t i) -> ChunkRecord<Variant> const& {
    return chunk_record<Variant>(p.workspace, sequence.first_slot + i, p.value_heads, value_head);
  };
  int64_t const chunks = p.plan.chunks_of(sequence.length);
  if (chunks) producer.load(chunk_of_head(p, sequence, 0, value_head), record(0));
  for (int64_t i = 0; i < chunks; ++i) {
    int const stage = int(i % kStages), parity = int(i % 2);
    producer.announce(chunk_of_head(p, sequence, i, value_head), parity);
    if (i >= kStages) sync_named(ScanBarrier::empty(stage), Shape::kThreads);
    producer.copy_record(record(i), stage);
    auto const load_next = [&] {
      if (i + 1 < chunks) producer.load(chunk_of_head(p, sequence, i + 1, value_head), record(i + 1));
    };
    if constexpr (sizeof(typename Variant::Element) == 2) {  // two chunks fit into the registers
      auto current = producer;
      load_next();
      current.build(stage, parity);
    } else {
      producer.build(stage, parity);
      load_next();
    }
    cp_async_wait<0>();
    if constexpr (Shape::kConfig.wgmma) fence_proxy_async();
    arrive_named(ScanBarrier::full(stage), Shape::kThreads);
  }
}

/// The scan's consumer warps: the recurrence.
template <class Variant>
KDA_DEVICE void consume_chunks(ChunkFwdParams const& p, ScanStorage<Variant>& s, Sequence const& sequence, int n,
                               int value_head, int value0) {
  using Shape = ScanShape<Variant>;
  constexpr int kStages = Shape::kConfig.stages, kChunk = Shape::kChunk;
  int const warp = thread_index() / 32, value = value0 + warp * 16;
  ScanConsumer<Variant> consumer{p, s, warp, value0};
  bool const has_initial = !p.has_initial_state || p.has_initial_state[n];
  load_state(consumer.state, state_at(has_initial ? p.initial_state : StateRef{}, p, n, value_head), p, value);

  int64_t const chunks = p.plan.chunks_of(sequence.length);
  int64_t const first_kept = p.chunk_states ? first_chunk_state(p, n) : 0;
  if (chunks) consumer.load_values(chunk_of_head(p, sequence, 0, value_head), 0);
  for (int64_t i = 0; i < chunks; ++i) {
    ChunkOfHead const chunk = chunk_of_head(p, sequence, i, value_head);
    int const stage = int(i % kStages), buffer = int(i % 2);
    store_state(consumer.state, chunk_state_at(p, first_kept, i * kChunk, value_head), p, value);
    sync_named(ScanBarrier::full(stage), Shape::kThreads);
    cp_async_wait<0>();
    sync_warp();
    consumer.start(s.stage[stage]);
    consumer.correct_values(buffer);
    if (i + 1 < chunks) consumer.load_values(chunk_of_head(p, sequence, i + 1, value_head), 1 - buffer);
    consumer.solve(s.stage[stage]);
    consumer.output_and_advance(s.stage[stage], buffer);
    consumer.store_output(chunk, buffer);
    consumer.finish();
    if (i + kStages < chunks) arrive_named(ScanBarrier::empty(stage), Shape::kThreads);
  }
  store_state(consumer.state, state_at(p.final_state, p, n, value_head), p, value);
}

template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant>::kThreads, 1) chunk_fwd_scan_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(ScanStorage<Variant>, storage);
  int const n = blockIdx.x, value_head = blockIdx.y, value0 = blockIdx.z * kValueTile;
  Sequence const sequence = p.plan.sequence(n);
  if (thread_index() < ScanShape<Variant>::kConsumers) {
    if constexpr (Variant::config.wgmma) set_max_registers<ScanShape<Variant>::kConsumerRegisters, true>();
    consume_chunks<Variant>(p, *storage, sequence, n, value_head, value0);
  } else {
    if constexpr (Variant::config.wgmma) set_max_registers<ScanShape<Variant>::kProducerRegisters, false>();
    produce_chunks<Variant>(p, *storage, sequence, value_head);
  }
}

}  // namespace kda
