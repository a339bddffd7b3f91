// Sums over the runs that a backward is cut into: in one order, so bits never vary.
#pragma once
#include "platform/platform.h"

namespace kda {

inline constexpr int kSumColumns = 8;  // of a block

template <int kThreads>
struct ColumnSumStorage {
  static constexpr int kSlices = kThreads / kSumColumns;
  float slice[kSlices][kSumColumns];
};

/// Calls store(column, sum) for the columns of this block of `partial` [runs, columns], fp32. A grid has a block for
/// every kSumColumns columns.
template <int kThreads, class Store>
KDA_DEVICE void sum_columns(ColumnSumStorage<kThreads>& storage, float const* partial, int64_t runs, int64_t columns,
                            Store store) {
  constexpr int kSlices = ColumnSumStorage<kThreads>::kSlices;
  int const mine = thread_index() % kSumColumns, slice = thread_index() / kSumColumns;
  int64_t const column = int64_t(blockIdx.x) * kSumColumns + mine;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 8
    for (int64_t run = slice; run < runs; run += kSlices) sum += partial[run * columns + column];
  }
  storage.slice[slice][mine] = sum;
  sync_block();
  if (slice || column >= columns) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) total += storage.slice[i][mine];
  store(column, total);
}

inline unsigned column_sum_blocks(int64_t columns) { return unsigned((columns + kSumColumns - 1) / kSumColumns); }

}  // namespace kda
