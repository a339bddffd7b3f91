// The kernels of the chunkwise forward: prepare (all chunks at once), then scan (chunk after chunk).
#pragma once
#include "kda/chunk_fwd/prepare.h"
#include "kda/chunk_fwd/scan.h"

namespace kda {

/// The plan with a chunk that the compiler knows.
template <class Variant>
KDA_DEVICE ChunkPlan plan_of(ChunkFwdParams const& p) {
  ChunkPlan plan = p.plan;
  plan.chunk = Variant::config.chunk;
  return plan;
}

/// Chunk `i` of a sequence, for one value head.
template <class Variant>
KDA_DEVICE ChunkOfHead chunk_of_head(ChunkFwdParams const& p, Sequence const& sequence, int64_t i, int value_head) {
  constexpr int kChunk = Variant::config.chunk;
  int64_t const first = i * kChunk, left = sequence.length - first;
  return {sequence.batch_row, sequence.begin + first, int32_t(left < kChunk ? left : kChunk),
          value_head / (p.value_heads / p.heads), value_head};
}

template <class Variant>
KDA_GLOBAL void __launch_bounds__(Prepare<Variant>::kThreads, Prepare<Variant>::kBlocksPerSm)
    chunk_fwd_prepare_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(PrepareStorage<Variant>, storage);
  ChunkPlan const plan = plan_of<Variant>(p);
  int64_t const slot = blockIdx.x;
  int const value_head = blockIdx.y;
  Sequence const sequence = plan.sequence(plan.sequence_of_slot(slot));
  int64_t const i = slot - sequence.first_slot;
  if (i < 0 || i >= plan.chunks_of(sequence.length)) return;  // a slot that no chunk uses

  Prepare<Variant> prepare{{p,
                            *storage,
                            {p.workspace, slot, p.value_heads, value_head, p.value_dim},
                            chunk_of_head<Variant>(p, sequence, i, value_head)}};
  prepare.load_chunk();
  prepare.normalise();
  prepare.scores();
  prepare.solve();
}

/// The scan's helper warps: at each step they bring one chunk, announce the one before and take away the output of the
/// one before that. The consumers may then be anywhere between: whatever either side waits for is already under way.
template <class Variant>
KDA_DEVICE void help_scan(ChunkFwdParams const& p, ScanStorage<Variant>& s, Sequence const& sequence, int64_t chunks,
                          int value_head, int value0) {
  using Barrier = ScanBarrier<Variant>;
  constexpr int kStages = ScanShape<Variant>::kStages;
  ScanHelper<Variant> helper{p, s, value0};
  for (int64_t i = 0; i < chunks + 2; ++i) {
    if (i >= 1 && i - 1 < chunks) helper.announce(int((i - 1) % kStages));
    if (i < chunks) {
      int const stage = int(i % kStages);
      if (i >= kStages) Barrier::wait(Barrier::empty(stage));
      helper.load({p.workspace, sequence.first_slot + i, p.value_heads, value_head, p.value_dim}, stage);
    }
    if (i >= 2) helper.store_output(chunk_of_head<Variant>(p, sequence, i - 2, value_head), int(i % 2), i < chunks);
  }
}

/// The scan's consumer warps: the recurrence.
template <class Variant>
KDA_DEVICE void consume_chunks(ChunkFwdParams const& p, ScanStorage<Variant>& s, Sequence const& sequence,
                               int64_t chunks, int n, int value_head, int value0) {
  using Barrier = ScanBarrier<Variant>;
  constexpr int kStages = ScanShape<Variant>::kStages, kChunk = Variant::config.chunk;
  int const warp = thread_index() / 32, value = value0 + warp * 16;
  ScanConsumer<Variant> consumer{s, warp};
  load_state(consumer.state, initial_state_at(p, n, value_head), p, value);

  bool const keeps = p.chunk_states.data || p.checkpoints.data;
  int64_t const first_kept = first_chunk_state(p, n);
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    auto const& in = s.stage[stage];
    int const buffer = int(i & 1);
    if (keeps) keep_states(consumer.state, p, n, first_kept, i * kChunk, value_head, value);
    consumer.wait_for_record(stage, parity);
    consumer.start(in);
    consumer.correct_values(in);
    consumer.advance(in);
    if (i + kStages < chunks) Barrier::arrive(Barrier::empty(stage));
    if (i >= 2) Barrier::wait(Barrier::output_empty(buffer));
    consumer.hand_over_output(buffer);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  finish_states(consumer.state, p, n, sequence.length, value_head, value);
}

template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant>::kThreads, 1) chunk_fwd_scan_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(ScanStorage<Variant>, storage);
  ChunkPlan const plan = plan_of<Variant>(p);
  int const n = blockIdx.x, value_head = blockIdx.y, value0 = blockIdx.z * kValueTile;
  Sequence const sequence = plan.sequence(n);
  int64_t const chunks = plan.chunks_of(sequence.length);
  if constexpr (ScanShape<Variant>::kAsync) {
    if (thread_index() == 0) {
      for (Mbarrier& full : storage->full) mbarrier_init(full, 1);
      fence_mbarrier_init();
    }
    sync_block();
  }
  if (shuffle(thread_index() / ScanShape<Variant>::kConsumers, 0) == 0)  // the same for the compiler in all lanes
    consume_chunks<Variant>(p, *storage, sequence, chunks, n, value_head, value0);
  else help_scan<Variant>(p, *storage, sequence, chunks, value_head, value0);
}

}  // namespace kda
