// The kernels of the chunkwise forward behind prepare: the scan (chunk after chunk), where sequences are split in three
// steps (segments.h).
#pragma once
#include "kda/chunk/chain.h"
#include "kda/chunk/scan.h"
#include "kda/chunk_fwd/states.h"

namespace kda {

/// The scan's producers: at each step they bring one chunk, announce the one before and take away the output of the
/// one before that. The consumers may then be anywhere between: whatever either side waits for is already under way.
template <class Variant, ScanPass kPass>
KDA_DEVICE void produce_chunks(ScanProducer<Variant, kPass> producer, ScanWork const& work) {
  using Barrier = ScanBarrier<Variant, kPass>;
  constexpr int kStages = ScanShape<Variant, kPass>::kStages;
  constexpr bool kOutputs = kPass == ScanPass::kOutputs;
  ChunkCall const& p = producer.p;
  int64_t const count = work.end - work.begin, first_record = work.sequence.first_cell + work.begin - p.first_cell;
  for (int64_t i = 0; i < count + (kOutputs ? 2 : 1); ++i) {
    if (i >= 1 && i - 1 < count) producer.announce(int((i - 1) % kStages));
    if (i < count) {
      int const stage = int(i % kStages);
      if (i >= kStages) {
        Barrier::wait(Barrier::empty(stage));
        if (producer.is_done(i - kStages)) return;
      }
      producer.load(first_record + i, work.value_head, stage, count - i);
      if (kOutputs && i >= kStages) producer.free_record(first_record + i - kStages, work.value_head);
    }
    if constexpr (kOutputs)
      if (i >= 2)
        producer.store_output(chunk_of_head<Variant>(p, work.sequence, work.begin + i - 2, work.value_head), int(i % 2),
                              i < count);
  }
  if constexpr (kOutputs)  // the consumers have handed over their last output
    for (int64_t i = count < kStages ? 0 : count - kStages; i < count; ++i)
      producer.free_record(first_record + i, work.value_head);
}

/// The state of the sequence that comes from the round before, or goes on into the next one. Consumer warps.
template <class Variant, int kKeyTiles>
KDA_DEVICE void load_carry(tile::Accumulator (&state)[kKeyTiles], ChunkFwdParams const& p, int value_head,
                           StateSlice slice) {
  if (p.progress) {
    if (lane_index() == 0) wait_flag(carry_ready(p, value_head, slice.row / kValueTile), p.round_index);
    sync_warp();
  }
  load_rows(state, carry_at<Variant>(p, p.round_index + 1, value_head), slice);
}
template <class Variant, int kKeyTiles>
KDA_DEVICE void store_carry(tile::Accumulator const (&state)[kKeyTiles], ChunkFwdParams const& p, int value_head,
                            StateSlice slice) {
  if (p.progress) wait_for_previous_kernel();  // and for those before: nobody reads these rows any more
  store_rows(state, carry_at<Variant>(p, p.round_index, value_head), slice);
  if (!p.progress) return;
  sync_named(ScanBarrier<Variant, ScanPass::kOutputs>::kConsumers, ScanShape<Variant, ScanPass::kOutputs>::kConsumers);
  if (thread_index() == 0) set_flag(carry_ready(p, value_head, slice.row / kValueTile), p.round_index + 1);
}

/// The scan's consumer warps: the recurrence, with outputs.
template <class Variant>
KDA_DEVICE void output_chunks(ChunkFwdParams const& p, ScanConsumer<Variant, ScanPass::kOutputs> consumer,
                              ScanWork const& work, int value0) {
  using Barrier = ScanBarrier<Variant, ScanPass::kOutputs>;
  constexpr int kStages = ScanShape<Variant, ScanPass::kOutputs>::kStages, kChunk = Variant::config.chunk;
  int const n = work.n, value_head = work.value_head;
  StateSlice const value = consumer.slice(value0);
  if (p.segments) load_rows(consumer.state, segment_at<Variant>(p, work.segment, value_head).state, value);
  else if (work.begin == 0) load_state(consumer.state, initial_state_at(p, n, value_head), p, value);
  else load_carry<Variant>(consumer.state, p, value_head, value);

  bool const keeps = p.chunk_states.data || p.checkpoints.data;
  int64_t const first_kept = first_chunk_state(p, n), count = work.end - work.begin;
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t i = 0; i < count; ++i) {
    int const buffer = int(i & 1);
    if (keeps) keep_states(consumer.state, p, n, first_kept, (work.begin + i) * kChunk, value_head, value);
    consumer.step(stage, parity);
    if (i + kStages < count) Barrier::arrive(Barrier::empty(stage));
    if (i >= 2) Barrier::wait(Barrier::output_empty(buffer));
    consumer.hand_over_output(buffer);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  if (work.end == work.chunks) finish_states(consumer.state, p, n, work.sequence.length, value_head, value);
  else if (work.following == 0) store_carry<Variant>(consumer.state, p, value_head, value);
}

/// The same without outputs. `may_forget`: stops once all rows are negligible, and returns false then.
template <class Variant>
KDA_DEVICE bool summarise_chunks(ScanConsumer<Variant, ScanPass::kSummary>& consumer, int64_t count, bool may_forget) {
  using Barrier = ScanBarrier<Variant, ScanPass::kSummary>;
  constexpr int kStages = ScanShape<Variant, ScanPass::kSummary>::kStages;
  static_assert(kCheckInterval >= kStages);
  int stage = 0;
  uint32_t parity = 0;
  auto const next = [&] {
    int const used = stage;
    if (++stage == kStages) stage = 0, parity ^= 1;
    return used;
  };
  for (int64_t i = 0; i < count; ++i) {
    consumer.step(stage, parity);
    int const used = next();
    if (i + kStages >= count) continue;
    bool const forgotten = may_forget && i % kCheckInterval == 0 && consumer.has_forgotten();
    Barrier::arrive(Barrier::empty(used));
    if (!forgotten) continue;
    for (int j = 1; j < kStages; ++j) consumer.wait_for_record(stage, parity), next();  // nothing may be under way
    return false;
  }
  return true;
}

/// S_local from zero, or from where the sequence starts; or rows of M from the identity.
template <class Variant>
KDA_DEVICE void summarise_segment(ChunkFwdParams const& p, ScanConsumer<Variant, ScanPass::kSummary> consumer,
                                  ScanWork const& work, int value0, int key0) {
  StateSlice const value = consumer.slice(value0), key = consumer.slice(key0);
  int64_t const count = work.following ? work.end - work.begin : 0;
  SegmentAt const at = segment_at<Variant>(p, work.segment, work.value_head);
  if (!consumer.has_values) {
    set_identity(consumer.state, key);
  } else if (work.begin == 0) {
    load_state(consumer.state, initial_state_at(p, work.n, work.value_head), p, value);
  } else if (work.first) {
    load_rows(consumer.state, carry_at<Variant>(p, p.round_index + 1, work.value_head), value);
  } else {
    load_state(consumer.state, {}, p, value);
  }
  if (work.first) store_rows(consumer.state, at.state, value);
  bool const remembers = summarise_chunks(consumer, count, !consumer.has_values);
  if (consumer.has_values) {
    if (work.following)
      store_rows(consumer.state, segment_at<Variant>(p, work.segment + 1, work.value_head).state, value);
    return;
  }
  if (thread_index() == 0) at.negligible[key0 / kValueTile] = remembers ? 0.f : 1.f;
  if (remembers) store_rows(consumer.state, at.transition, key);
}

/// Block z: 64 columns of V.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant, ScanPass::kOutputs>::kThreads, 1)
    chunk_fwd_scan_kernel(ChunkFwdParams const p) {
  using Storage = ScanStorage<Variant, ScanPass::kOutputs>;
  KDA_DYNAMIC_SHARED(Storage, storage);
  if (p.progress) let_next_kernel_start();  // the prepare kernel of the next round
  else wait_for_previous_kernel();
  if (ScanWork work; find_scan_work<Variant>(work, p, blockIdx.x, blockIdx.y)) {
    int const value0 = blockIdx.z * kValueTile;
    init_scan<Variant, ScanPass::kOutputs>(*storage);
    if (is_consumer<Variant, ScanPass::kOutputs>())
      output_chunks<Variant>(p, {*storage, thread_index() / 32, true}, work, value0);
    else produce_chunks<Variant, ScanPass::kOutputs>({p, *storage, value0, p.o}, work);
  }
  // So that nothing behind this kernel starts before those that it ran beside end:
  if (p.progress && blockIdx.x == gridDim.x - 1 && blockIdx.y == 0 && blockIdx.z == 0) wait_for_previous_kernel();
}

/// Block z: 64 columns of V, then 64 rows of M. Only what the chain needs: no M of a first segment, nothing of a last
/// one, except that the start of the first is kept for the outputs pass.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(ScanShape<Variant, ScanPass::kSummary>::kThreads,
                                  ScanShape<Variant, ScanPass::kSummary>::kBlocksPerSm)
    chunk_fwd_summarise_kernel(ChunkFwdParams const p) {
  using Storage = ScanStorage<Variant, ScanPass::kSummary>;
  KDA_DYNAMIC_SHARED(Storage, storage);
  ScanWork work;
  int const tiles = value_tiles(p.value_dim), z = blockIdx.z, value0 = z * kValueTile, key0 = (z - tiles) * kValueTile;
  bool const has_values = z < tiles;
  if (!find_scan_work<Variant>(work, p, blockIdx.x, blockIdx.y)) return;
  if (has_values ? work.following == 0 && !work.first : work.following == 0 || work.first) return;
  init_scan<Variant, ScanPass::kSummary>(*storage);
  if (is_consumer<Variant, ScanPass::kSummary>())
    summarise_segment<Variant>(p, {*storage, thread_index() / 32, has_values}, work, value0, key0);
  else if (work.following)
    produce_chunks<Variant, ScanPass::kSummary>({p, *storage, has_values ? value0 : -1, {}}, work);
}

}  // namespace kda
