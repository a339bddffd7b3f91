// Sums over the runs that a backward is cut into: in one order, so bits never vary.
#pragma once
#include "platform/platform.h"

namespace kda {

/// A block sums kColumns columns; each of its threads an equal share of the runs of one.
template <int kThreads, int kColumns>
struct ColumnSumStorage {
  static constexpr int kSlices = kThreads / kColumns;
  float slice[kSlices][kColumns];
};

/// Calls store(column, sum) for the columns of this block of `partial` [runs, columns], fp32. A grid has a block for
/// every kColumns columns.
template <int kThreads, int kColumns, class Store>
KDA_DEVICE void sum_columns(ColumnSumStorage<kThreads, kColumns>& storage, float const* partial, int64_t runs,
                            int64_t columns, Store store) {
  constexpr int kSlices = ColumnSumStorage<kThreads, kColumns>::kSlices;
  int const mine = thread_index() % kColumns, slice = thread_index() / kColumns;
  int64_t const column = int64_t(blockIdx.x) * kColumns + mine;
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

inline unsigned column_sum_blocks(int64_t columns, int of_block) {
  return unsigned((columns + of_block - 1) / of_block);
}

}  // namespace kda
