// The launch of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/chunk/launch_prepare_variant.h"
#include "kda/chunk/variants.h"
#include "kda/chunk_fwd/clear.h"
#include "kda/chunk_fwd/kernel.h"
#include "kda/chunk_fwd/launch.h"
#include "platform/launch.h"

namespace kda {

/// The kernels of a variant, in the order of their launches.
template <class Variant>
struct ChunkFwdKernels {
  using K = Kernel<ChunkFwdParams>;
  static Kernel<uint32_t*, int64_t> reset() {
    return {{"chunk_fwd_reset", &typeid(Variant), kClearThreads, 0}, chunk_fwd_reset_kernel<Variant>};
  }
  static K clear() {
    return {{"chunk_fwd_clear", &typeid(Variant), kClearThreads, 0}, chunk_fwd_clear_kernel<Variant>};
  }
  static K summarise() {
    return {{"chunk_fwd_summarise", &typeid(Variant), ScanShape<Variant, ScanPass::kSummary>::kThreads,
             sizeof(ScanStorage<Variant, ScanPass::kSummary>)},
            chunk_fwd_summarise_kernel<Variant>};
  }
  static Kernel<ChunkCall> join() {
    return {{"chunk_fwd_join", &typeid(Variant), JoinShape<Variant>::kThreads, sizeof(JoinStorage<Variant>)},
            chunk_fwd_join_kernel<Variant>};
  }
  static K scan() {
    return {{"chunk_fwd_scan", &typeid(Variant), ScanShape<Variant, ScanPass::kOutputs>::kThreads,
             sizeof(ScanStorage<Variant, ScanPass::kOutputs>)},
            chunk_fwd_scan_kernel<Variant>};
  }
  static std::vector<KernelLaunch> all() {
    std::vector<KernelLaunch> kernels{clear(), reset(), summarise(), join(), scan()};
    for (KernelLaunch const& kernel : prepare_kernels<Variant>()) kernels.push_back(kernel);
    return kernels;
  }
};

/// Everything of one part that no state is needed for.
template <class Variant>
void launch_prepare(ChunkFwdParams& p, ChunkFwdVariant const& variant, ChunkFwdVariant::Schedule const& schedule,
                    cudaStream_t stream) {
  bool const own = p.progress && schedule.reserved;
  int const teams = own ? schedule.teams : 1;
  p.last_first = !own && !p.segments && p.plan.sequences == 1;
  p.walkers =
      own ? std::min(schedule.walkers, p.part_slots) : variant.prepare_walk(p.part_slots, p.value_heads).walkers;
  launch_prepare<Variant>(p, teams, p.progress, stream);
}

/// The scan of one part; where sequences are split, in three steps.
template <class Variant>
void launch_scan(ChunkFwdParams const& p, cudaStream_t stream) {
  using Kernels = ChunkFwdKernels<Variant>;
  unsigned const heads = unsigned(p.value_heads), tiles = unsigned(value_tiles(p.value_dim));
  unsigned const segments = unsigned(part_segments(p.plan, p.part_slots, p.segment_tokens / Variant::config.chunk));
  if (p.segments) {
    launch(Kernels::summarise(), dim3(segments, heads, tiles + Variant::config.key_tile / kValueTile), stream, p);
    launch(Kernels::join(), dim3(segments, heads, tiles * (kValueTile / JoinShape<Variant>::kRows)), stream, p);
  }
  launch_early(true, Kernels::scan(), dim3(segments, heads, tiles), stream, p);
}

template <class Variant>
void launch_chunk_fwd(ChunkFwdParams p, cudaStream_t stream) {
  ChunkFwdVariant const variant = describe_chunk_fwd<Variant>();
  ChunkFwdCall const call(p);
  OverlapScope const overlap;
  if (p.clear_unowned)
    launch(ChunkFwdKernels<Variant>::clear(),
           dim3(unsigned(p.plan.sequences + 2 - first_unowned(p.plan)), kClearBlocks), stream, p);
  static_assert(alignof(ChunkRecord<Variant>) == kRecordAlignment);
  char* const workspace = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p.workspace) + kRecordAlignment - 1) /
                                                  kRecordAlignment * kRecordAlignment);
  p.workspace = workspace;
  p.cell_bytes = int64_t(variant.cell_bytes(call.value_dim)), p.inverse_offset = 0;
  p.first_head = 0, p.part_heads = p.value_heads;
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
    launch(ChunkFwdKernels<Variant>::reset(), dim3(1), stream, p.progress, variant.progress_counters(call));
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
  using Kernels = ChunkFwdKernels<Variant>;
  KernelLaunch const prepare = PrepareKernels<Variant>::one_team(), scan = Kernels::scan();
  return {Variant::name,
          dtype_of<typename Variant::Element>(),
          Variant::config.chunk,
          Variant::config.key_tile,
          Variant::config.wgmma,
          sizeof(ChunkRecord<Variant>),
          sizeof(typename ChunkRecord<Variant>::Values),
          prepare.shared_bytes,
          scan.shared_bytes,
          prepare.threads,
          prepare_teams<Variant>(),
          scan.threads,
          &Kernels::all,
          &launch_chunk_fwd<Variant>};
}

/// What the file of a variant compiles.
#define KDA_CHUNK_FWD_VARIANT(Variant)                                              \
  template void launch_prepare<Variant>(ChunkCall const&, int, bool, cudaStream_t); \
  template ChunkFwdVariant describe_chunk_fwd<Variant>()

}  // namespace kda
