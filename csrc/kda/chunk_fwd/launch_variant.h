// The launch of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/chunk_fwd/clear.h"
#include "kda/chunk_fwd/kernel.h"
#include "kda/chunk_fwd/launch.h"
#include "kda/chunk_fwd/variants.h"
#include "platform/launch.h"

namespace kda {

/// Everything of one part that no state is needed for.
template <class Variant>
void launch_prepare(ChunkFwdParams& p, ChunkFwdVariant const& variant, ChunkFwdVariant::Schedule const& schedule,
                    cudaStream_t stream) {
  bool const own = p.progress && schedule.reserved;
  int const teams = own ? schedule.teams : 1;
  p.walkers =
      own ? std::min(schedule.walkers, p.part_slots) : variant.prepare_walk(p.part_slots, p.value_heads).walkers;
  auto const launch = [&](auto kernel) {
    launch_early(
        p.progress, "chunk_fwd_prepare", kernel, dim3(unsigned(divide_up(int64_t(p.walkers) * p.value_heads, teams))),
        dim3(unsigned(Prepare<Variant, 1>::kThreads * teams)), sizeof(PrepareStorage<Variant>) * teams, stream, p);
  };
  if constexpr (Variant::config.wgmma)
    if (teams > 1) return launch(chunk_fwd_prepare_teams_kernel<Variant>);
  launch(chunk_fwd_prepare_kernel<Variant>);
}

/// The scan of one part; where sequences are split, in three steps.
template <class Variant>
void launch_scan(ChunkFwdParams const& p, cudaStream_t stream) {
  using Join = JoinShape<Variant>;
  unsigned const heads = unsigned(p.value_heads), tiles = unsigned(value_tiles(p.value_dim));
  unsigned const segments = unsigned(part_segments(p.plan, p.part_slots, p.segment_tokens / Variant::config.chunk));
  if (p.segments) {
    launch("chunk_fwd_summarise", chunk_fwd_summarise_kernel<Variant>,
           dim3(segments, heads, tiles + Variant::config.key_tile / kValueTile),
           dim3(ScanShape<Variant, false>::kThreads), sizeof(ScanStorage<Variant, false>), stream, p);
    launch("chunk_fwd_join", chunk_fwd_join_kernel<Variant>, dim3(segments, heads, tiles * (kValueTile / Join::kRows)),
           dim3(Join::kThreads), sizeof(JoinStorage<Variant>), stream, p);
  }
  launch_early(true, "chunk_fwd_scan", chunk_fwd_scan_kernel<Variant>, dim3(segments, heads, tiles),
               dim3(ScanShape<Variant, true>::kThreads), sizeof(ScanStorage<Variant, true>), stream, p);
}

template <class Variant>
void launch_chunk_fwd(ChunkFwdParams p, cudaStream_t stream) {
  ChunkFwdVariant const variant = describe_chunk_fwd<Variant>();
  ChunkFwdCall const call(p);
  OverlapScope const overlap;
  if (p.clear_unowned)
    launch("chunk_fwd_clear", chunk_fwd_clear_kernel<Variant>, dim3(unsigned(p.plan.sequences + 2), kClearBlocks),
           dim3(kClearThreads), 0, stream, p);
  static_assert(alignof(ChunkRecord<Variant>) == kRecordAlignment);
  char* const workspace = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p.workspace) + kRecordAlignment - 1) /
                                                  kRecordAlignment * kRecordAlignment);
  p.workspace = workspace;
  p.carry = reinterpret_cast<float*>(workspace + variant.carry_offset(call));
  int64_t const split = variant.split(call).segment_chunks;
  p.segments = split ? reinterpret_cast<float*>(workspace + variant.segments_offset(call)) : nullptr;
  p.segment_tokens = (split ? split : p.plan.chunks_of(p.plan.tokens) + 1) * p.plan.chunk;

  int64_t const slots = p.plan.slots();
  ChunkFwdVariant::Schedule const schedule = variant.schedule(call);
  int64_t const part_slots = split ? variant.part_slots(call) : schedule.part_slots;
  p.progress = nullptr;
  if (overlaps_kernels() && !split && slots) {
    p.progress = reinterpret_cast<uint32_t*>(workspace + variant.progress_offset(call));
    launch("chunk_fwd_reset", chunk_fwd_reset_kernel<Variant>, dim3(1), dim3(kClearThreads), 0, stream, p.progress,
           variant.progress_counters(call));
  }
  p.first_slot = 0, p.part = 0;
  do {  // also where there is no slot at all: the scan writes final states
    p.part_slots = int32_t(slots - p.first_slot < part_slots ? slots - p.first_slot : part_slots);
    p.more_parts = p.first_slot + part_slots < slots;
    if (p.part_slots) launch_prepare<Variant>(p, variant, schedule, stream);
    launch_scan<Variant>(p, stream);
    p.first_slot += part_slots, ++p.part;
  } while (p.first_slot < slots);
}

template <class Variant>
ChunkFwdVariant describe_chunk_fwd() {
  return {Variant::name,
          dtype_of<typename Variant::Element>(),
          Variant::config.chunk,
          Variant::config.key_tile,
          Variant::config.wgmma,
          sizeof(ChunkRecord<Variant>),
          sizeof(typename ChunkRecord<Variant>::Values),
          sizeof(PrepareStorage<Variant>),
          sizeof(ScanStorage<Variant, true>),
          Prepare<Variant, 1>::kThreads,
          prepare_teams<Variant>(),
          ScanShape<Variant, true>::kThreads,
          &launch_chunk_fwd<Variant>};
}

}  // namespace kda
