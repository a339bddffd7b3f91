// The launch of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/chunk/launch_prepare_variant.h"
#include "kda/chunk/variants.h"
#include "kda/chunk_fwd/clear.h"
#include "kda/chunk_fwd/kernel.h"
#include "kda/chunk_fwd/schedule.h"
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
  static Kernel<ChunkCall> chain() {
    return {{"chunk_fwd_chain", &typeid(Variant), ChainShape<Variant>::kThreads, sizeof(ChainStorage<Variant>)},
            chunk_fwd_chain_kernel<Variant>};
  }
  static K scan() {
    return {{"chunk_fwd_scan", &typeid(Variant), ScanShape<Variant, ScanPass::kOutputs>::kThreads,
             sizeof(ScanStorage<Variant, ScanPass::kOutputs>)},
            chunk_fwd_scan_kernel<Variant>};
  }
  static std::vector<KernelLaunch> all() {
    std::vector<KernelLaunch> kernels{clear(), reset(), summarise(), chain(), scan()};
    for (KernelLaunch const& kernel : prepare_kernels<Variant>()) kernels.push_back(kernel);
    return kernels;
  }
};

/// The scan of one round, so many blocks for each value head and tile of V; where sequences are split, in three steps.
template <class Variant>
void launch_scan(ChunkFwdParams const& p, int64_t segments, cudaStream_t stream) {
  using Kernels = ChunkFwdKernels<Variant>;
  unsigned const x = unsigned(segments), heads = unsigned(p.value_heads), tiles = unsigned(value_tiles(p.value_dim));
  if (p.segments) {
    launch(Kernels::summarise(), dim3(x, heads, tiles + Variant::config.key_tile / kValueTile), stream, p);
    launch(Kernels::chain(), dim3(x, heads, tiles * (kValueTile / ChainShape<Variant>::kRows)), stream, p);
  }
  launch_early(true, Kernels::scan(), dim3(x, heads, tiles), stream, p);
}

template <class Variant>
void launch_chunk_fwd(ChunkFwdParams p, ChunkFwdSchedule const& schedule, cudaStream_t stream) {
  static_assert(alignof(ChunkRecord<Variant>) == kRecordAlignment);
  using Kernels = ChunkFwdKernels<Variant>;
  ChunkFwdWorkspace const& w = schedule.workspace;
  OverlapScope const overlap;
  if (p.clear_unowned)
    launch(Kernels::clear(), dim3(unsigned(p.plan.sequences + 2 - first_unowned(p.plan)), kClearBlocks), stream, p);
  char* const workspace = align_workspace(p.workspace);
  p.workspace = workspace, p.cell_bytes = w.cell_bytes, p.inverse_offset = 0;
  p.first_head = 0, p.round_heads = p.value_heads;
  p.carry = reinterpret_cast<float*>(workspace + w.carry);
  int64_t const split = schedule.segment_chunks;
  p.segments = split ? reinterpret_cast<float*>(workspace + w.segments) : nullptr;
  p.segment_tokens = (split ? split : unsplit_chunks(p.plan)) * p.plan.chunk;
  p.last_first = schedule.last_first;
  p.progress = nullptr;
  if (schedule.beside && schedule.whole.cells) {
    p.progress = reinterpret_cast<uint32_t*>(workspace + w.progress);
    launch(Kernels::reset(), dim3(1), stream, p.progress, w.counters);
  }
  p.first_cell = 0;
  for (p.round_index = 0; p.round_index < schedule.rounds; ++p.round_index) {
    ChunkFwdRound const& round = schedule.round(p.round_index);
    p.round_cells = int32_t(round.cells), p.walkers = round.walkers,
    p.more_rounds = p.round_index + 1 < schedule.rounds;
    if (round.cells) launch_prepare<Variant>(p, schedule.teams, p.progress, stream);
    launch_scan<Variant>(p, round.segments, stream);  // also where there is no cell at all: it writes final states
    p.first_cell += round.cells;
  }
}

template <class Variant>
ChunkFwdVariant describe_chunk_fwd() {
  using Kernels = ChunkFwdKernels<Variant>;
  KernelLaunch const scan = Kernels::scan();
  return {Variant::name,
          dtype_of<typename Variant::Element>(),
          Variant::config.chunk,
          Variant::config.key_tile,
          Variant::config.wgmma,
          sizeof(ChunkRecord<Variant>),
          sizeof(typename ChunkRecord<Variant>::Values),
          describe_prepare<Variant>(),
          scan.shared_bytes,
          scan.threads,
          &Kernels::all,
          &launch_chunk_fwd<Variant>};
}

/// What the file of a variant compiles.
#define KDA_CHUNK_FWD_VARIANT(Variant)                                              \
  template PrepareVariant describe_prepare<Variant>();                              \
  template void launch_prepare<Variant>(ChunkCall const&, int, bool, cudaStream_t); \
  template ChunkFwdVariant describe_chunk_fwd<Variant>()

}  // namespace kda
