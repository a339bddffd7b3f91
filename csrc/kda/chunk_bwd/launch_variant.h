// The launch of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/chunk/launch_prepare.h"
#include "kda/chunk/variants.h"
#include "kda/chunk_bwd/clear.h"
#include "kda/chunk_bwd/kernel.h"
#include "kda/chunk_bwd/launch.h"

namespace kda {

/// The kernels of a variant, in the order of their launches.
template <class Variant>
struct ChunkBwdKernels {
  using K = Kernel<ChunkBwdParams>;
  static K clear() {
    return {{"chunk_bwd_clear", &typeid(Variant), kClearThreads, 0}, chunk_bwd_clear_kernel<Variant>};
  }
  static K scan() {
    return {{"chunk_bwd_scan", &typeid(Variant), ScanShape<Variant, ScanPass::kReverse>::kThreads,
             sizeof(ScanPairStorage<Variant>)},
            chunk_bwd_scan_kernel<Variant>};
  }
  static K values() {
    return {{"chunk_bwd_values", &typeid(Variant), ValueGradients<Variant>::kThreads, sizeof(ValuesStorage<Variant>)},
            chunk_bwd_values_kernel<Variant>};
  }
  static K keys() {
    return {{"chunk_bwd_keys", &typeid(Variant), KeysThread<Variant>::kThreads, sizeof(KeysStorage<Variant>),
             KeysSlice<Variant>::kSlices},
            chunk_bwd_keys_kernel<Variant>};
  }
  static K reduce() {
    return {{"chunk_bwd_reduce", &typeid(Variant), kReduceThreads, kReduceThreads * sizeof(float)},
            chunk_bwd_reduce_kernel<Variant>};
  }
  static Kernel<ChunkBwdParams, int64_t> sum_heads() {
    return {{"chunk_bwd_sum_heads", &typeid(Variant), kReduceThreads, 0}, chunk_bwd_sum_heads_kernel<Variant>};
  }
  static std::vector<KernelLaunch> all() { return {clear(), scan(), values(), keys(), reduce(), sum_heads()}; }
};

/// Rows of so many elements, each in the row of a gradient.
template <class E>
Rows rows_in_gradient(Rows const& d, int columns) {
  int64_t const n = d.is_fp32 ? int64_t(sizeof(float) / sizeof(E)) : 1;
  bool const in_pieces = d.in_pieces && columns % (16 / int(sizeof(E))) == 0;
  return {d.data, {n * d.strides.batch, n * d.strides.token, n * d.strides.head}, sizeof(E) == 4, in_pieces};
}

/// Everything of the value heads [p.first_head, p.first_head + p.round_heads).
template <class Variant>
void launch_round(ChunkBwdParams const& p, cudaStream_t stream) {
  using Kernels = ChunkBwdKernels<Variant>;
  unsigned const heads = unsigned(p.round_heads), cells = unsigned(p.round_cells);
  unsigned const tiles = unsigned(value_tiles(p.value_dim));
  unsigned const segments = unsigned(round_segments(p.plan, p.round_cells, p.segment_tokens / Variant::config.chunk));
  bool const of_tokens = p.dv.data, of_keys = p.dq.data || p.dk.data || p.dg.data || p.dA_log || p.ddt_bias;
  if (cells) launch_prepare<Variant>(p, 1, false, stream);
  launch(Kernels::scan(), dim3(segments, heads, of_tokens ? 2 * tiles : tiles), stream, p);
  if (cells && of_tokens) launch(Kernels::values(), dim3(cells, heads), stream, p);
  if (cells && of_keys) launch(Kernels::keys(), dim3(cells * KeysSlice<Variant>::kSlices, heads), stream, p);
  if (p.dA_log || p.ddt_bias)
    launch(Kernels::reduce(), dim3(heads, unsigned(Variant::config.key_tile / 32 + 1)), stream, p);
}

template <class Variant>
void launch_chunk_bwd(ChunkBwdParams p, ChunkBwdSchedule const& schedule, cudaStream_t stream) {
  p.workspace = align_workspace(p.workspace);
  int const tiles = value_tiles(p.value_dim);
  p.cell_bytes = BackwardCell<Variant>::size(tiles);
  p.inverse_offset = int32_t(BackwardCell<Variant>::inverse_offset(tiles));
  if (!p.w.data) p.w = rows_in_gradient<typename Variant::Element>(p.dk, p.key_dim);
  if (!p.l.data) p.l = rows_in_gradient<typename Variant::Element>(p.dq, Variant::config.chunk);
  p.first_cell = 0, p.round_index = 0, p.round_cells = int32_t(p.plan.cells());
  p.segment_tokens = unsplit_chunks(p.plan) * p.plan.chunk;
  if (p.plan.cu_seqlens && p.dv.data) launch(ChunkBwdKernels<Variant>::clear(), dim3(2, kClearBlocks), stream, p);
  for (int round = 0; round < schedule.rounds; ++round) {
    p.first_head = round * schedule.heads_per_round;
    p.round_heads = std::min(schedule.heads_per_round, p.value_heads - p.first_head);
    p.walkers = round + 1 < schedule.rounds ? schedule.walkers : schedule.last_walkers;
    launch_round<Variant>(p, stream);
  }
  if (!p.dq_sum && !p.dk_sum) return;
  int64_t const rows = p.plan.tokens * (p.plan.cu_seqlens ? 1 : p.plan.sequences);
  int64_t const blocks = divide_up(rows * p.heads * p.key_dim, kReduceThreads);
  if (blocks)
    launch(ChunkBwdKernels<Variant>::sum_heads(), dim3(unsigned(std::min<int64_t>(blocks, 16384))), stream, p, rows);
}

template <class Variant>
ChunkBwdVariant describe_chunk_bwd() {
  using Kernels = ChunkBwdKernels<Variant>;
  size_t shared = 0;
  for (KernelLaunch const& kernel : Kernels::all()) shared = std::max(shared, kernel.shared_bytes);
  return {Variant::name,
          dtype_of<typename Variant::Element>(),
          Variant::config.chunk,
          Variant::config.key_tile,
          Variant::config.wgmma,
          shared,
          describe_prepare<Variant>(),
          [](int value_dim) { return BackwardCell<Variant>::size(value_tiles(value_dim)); },
          BackwardCell<Variant>::kFrontBytes,
          &Kernels::all,
          &launch_chunk_bwd<Variant>};
}

}  // namespace kda
