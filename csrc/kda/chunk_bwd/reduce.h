// What is summed in a fixed order once the chunks are done: dA_log and ddt_bias over the tokens, dq and dk over the
// value heads of a group.
#pragma once
#include "kda/chunk_bwd/cell.h"
#include "kda/chunk_bwd/params.h"

namespace kda {

inline constexpr int kReduceThreads = 256;

/// Block x: a value head. Threads share the cells of a channel, then their sums are added in order.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kReduceThreads) chunk_bwd_reduce_kernel(ChunkBwdParams const p) {
  constexpr int kKeyTile = Variant::config.key_tile, kColumns = 32, kRows = kReduceThreads / kColumns;
  struct Storage {
    float sum[kRows][kColumns];
  };
  KDA_DYNAMIC_SHARED(Storage, storage);
  int const head = p.first_head + int(blockIdx.x), column = thread_index() % kColumns, row = thread_index() / kColumns;
  int const channel = int(blockIdx.y) * kColumns + column;  // the one behind the last channel: dA_log
  float sum = 0.f;
  if (channel <= kKeyTile)
    for (int64_t cell = row; cell < p.round_cells; cell += kRows) {
      ChunkSums<Variant> const& chunk = BackwardCell<Variant>(p, cell, head).sums();
      sum += channel < kKeyTile ? chunk.ddt_bias[channel] : chunk.dA_log_of_all();
    }
  storage->sum[row][column] = sum;
  sync_block();
  if (row) return;
  for (int i = 1; i < kRows; ++i) sum += storage->sum[i][column];
  if (channel < p.key_dim && p.ddt_bias) p.ddt_bias[int64_t(head) * p.key_dim + channel] = sum;
  if (channel == kKeyTile && p.dA_log) p.dA_log[head] = sum;
}

/// One thread for an element of dq and dk; `rows`: of all batches. The tensors are contiguous.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kReduceThreads) chunk_bwd_sum_heads_kernel(ChunkBwdParams const p, int64_t rows) {
  using E = typename Variant::Element;
  int64_t const columns = int64_t(p.heads) * p.key_dim, count = rows * columns;
  int const group = p.value_heads / p.heads;
  for (int64_t i = int64_t(blockIdx.x) * kReduceThreads + thread_index(); i < count;
       i += int64_t(gridDim.x) * kReduceThreads) {
    int64_t const row = i / columns, head = i % columns / p.key_dim, channel = i % p.key_dim;
    int64_t const first = (row * p.value_heads + head * group) * p.key_dim + channel;
    for (int kind = 0; kind < 2; ++kind) {
      void* const to = kind ? p.dk_sum : p.dq_sum;
      if (!to) continue;
      float const* const from = static_cast<float const*>(kind ? p.dk.data : p.dq.data) + first;
      float sum = 0.f;
      for (int n = 0; n < group; ++n) sum += from[int64_t(n) * p.key_dim];
      static_cast<E*>(to)[i] = from_float<E>(sum);
    }
  }
}

}  // namespace kda
