// The kernels of the chunkwise forward: prepare (all chunks at once), then scan (chunk after chunk).
#pragma once
#include "kda/chunk_fwd/prepare.h"
#include "kda/chunk_fwd/scan.h"

namespace kda {

template <class Variant>
KDA_GLOBAL void __launch_bounds__(Prepare<Variant>::kThreads, Prepare<Variant>::kBlocksPerSm)
    chunk_fwd_prepare_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(PrepareStorage<Variant>, storage);
  int32_t const first = int32_t(blockIdx.x) * p.slots_per_block, end = first + p.slots_per_block;
  Prepare<Variant>::run(p, *storage, blockIdx.y, first, end < p.part_slots ? end : p.part_slots);
}

/// What one block of the scan does: chunks [begin, end) of a sequence, for one head and one tile of V.
struct ScanWork {
  Sequence sequence;
  int64_t begin, end, chunks;
  int n, value_head, value0;
};

/// False: nothing. Sequences without chunks belong to the part that has their first slot.
template <class Variant>
KDA_DEVICE bool find_scan_work(ScanWork& work, ChunkFwdParams const& p) {
  ChunkPlan const plan = plan_of<Variant>(p);
  work.n = int(blockIdx.x) + (p.first_slot ? plan.sequence_of_slot(p.first_slot) : 0);
  work.value_head = blockIdx.y, work.value0 = blockIdx.z * kValueTile;
  if (work.n >= plan.sequences) return false;
  work.sequence = plan.sequence(work.n);
  work.chunks = plan.chunks_of(work.sequence.length);
  int64_t const from = p.first_slot - work.sequence.first_slot, to = from + p.part_slots;  // as chunks of the sequence
  work.begin = from > 0 ? from : 0, work.end = to < work.chunks ? to : work.chunks;
  return work.begin < work.end || (work.chunks == 0 && from <= 0 && (to > 0 || p.part_slots == 0));
}

/// The scan's helper warps: at each step they bring one chunk, announce the one before and take away the output of the
/// one before that. The consumers may then be anywhere between: whatever either side waits for is already under way.
template <class Variant>
KDA_DEVICE void help_scan(ChunkFwdParams const& p, ScanStorage<Variant>& s, ScanWork const& work) {
  using Barrier = ScanBarrier<Variant>;
  constexpr int kStages = ScanShape<Variant>::kStages;
  ScanHelper<Variant> helper{p, s, work.value0};
  int64_t const count = work.end - work.begin, first_record = work.sequence.first_slot + work.begin - p.first_slot;
  for (int64_t i = 0; i < count + 2; ++i) {
    if (i >= 1 && i - 1 < count) helper.announce(int((i - 1) % kStages));
    if (i < count) {
      int const stage = int(i % kStages);
      if (i >= kStages) Barrier::wait(Barrier::empty(stage));
      helper.load({p.workspace, first_record + i, p.value_heads, work.value_head, p.value_dim}, stage);
    }
    if (i >= 2)
      helper.store_output(chunk_of_head<Variant>(p, work.sequence, work.begin + i - 2, work.value_head), int(i % 2),
                          i < count);
  }
}

/// The scan's consumer warps: the recurrence.
template <class Variant>
KDA_DEVICE void consume_chunks(ChunkFwdParams const& p, ScanStorage<Variant>& s, ScanWork const& work) {
  using Barrier = ScanBarrier<Variant>;
  constexpr int kStages = ScanShape<Variant>::kStages, kChunk = Variant::config.chunk;
  int const n = work.n, value_head = work.value_head, value = work.value0 + thread_index() / 32 * 16;
  ScanConsumer<Variant> consumer{s, thread_index() / 32};
  if (work.begin == 0) load_state(consumer.state, initial_state_at(p, n, value_head), p, value);
  else load_carry(consumer.state, p, p.part + 1, value_head, work.value0);

  bool const keeps = p.chunk_states.data || p.checkpoints.data;
  int64_t const first_kept = first_chunk_state(p, n), count = work.end - work.begin;
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t i = 0; i < count; ++i) {
    auto const& in = s.stage[stage];
    int const buffer = int(i & 1);
    if (keeps) keep_states(consumer.state, p, n, first_kept, (work.begin + i) * kChunk, value_head, value);
    consumer.wait_for_record(stage, parity);
    consumer.start(in);
    consumer.correct_values(in);
    consumer.advance(in);
    if (i + kStages < count) Barrier::arrive(Barrier::empty(stage));
    if (i >= 2) Barrier::wait(Barrier::output_empty(buffer));
    consumer.hand_over_output(buffer);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  if (work.end == work.chunks) finish_states(consumer.state, p, n, work.sequence.length, value_head, value);
  else store_carry(consumer.state, p, p.part, value_head, work.value0);
}

template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant>::kThreads, 1) chunk_fwd_scan_kernel(ChunkFwdParams const p) {
  KDA_DYNAMIC_SHARED(ScanStorage<Variant>, storage);
  ScanWork work;
  if (!find_scan_work<Variant>(work, p)) return;
  if constexpr (ScanShape<Variant>::kAsync) {
    if (thread_index() == 0) {
      for (Mbarrier& full : storage->full) mbarrier_init(full, 1);
      fence_mbarrier_init();
    }
    sync_block();
  }
  // Of a shuffle, so that the compiler sees whole warps on either side.
  if (shuffle(thread_index() / ScanShape<Variant>::kConsumers, 0) == 0) consume_chunks<Variant>(p, *storage, work);
  else help_scan<Variant>(p, *storage, work);
}

}  // namespace kda
