// RMSNorm of each row times an activation of its gate: forward, and backward with every gradient.
#pragma once
#include <cstdint>

#include "kda/activation.h"
#include "kda/dtype.h"

namespace kda {

/// Rows [outer, heads, dim] of a tensor in the element type of the call; a row is contiguous. Strides in elements.
struct NormRows {
  void* data;
  int64_t outer_stride, head_stride;
};

/// y = x / sqrt(mean(x^2) + eps) * weight * activation(gate), over dim.
struct GatedRmsNormParams {
  NormRows x, gate;
  NormRows y;          // forward: the result; backward: its gradient (read)
  NormRows dx, dgate;  // backward
  bool in_pieces;      // 16 bytes can be moved at once, everywhere
  void const* weight;  // [dim]
  void* dweight;       // backward: [dim]
  Dtype weight_dtype;
  int64_t outer;
  int32_t heads, dim;
  float eps, per_dim;  // the latter is 1 / dim
  Activation activation;
  float* partial;  // backward: [runs, dim]
  int32_t runs;    // backward: the rows are cut into so many runs, whose sums are added in order
};

inline constexpr int kNormThreads = 128, kNormElements = 8;  // of a row, per thread
inline constexpr int kNormMaxPieceDim = 32 * kNormElements;  // longer rows are read by loops
inline constexpr int kNormRowsPerRun = 32, kNormMaxRuns = 4096;
inline constexpr int kNormSumThreads = 1024, kNormSumColumns = 8;

inline int32_t gated_rmsnorm_runs(int64_t rows) {
  int64_t const runs = (rows + kNormRowsPerRun - 1) / kNormRowsPerRun;
  return int32_t(runs < 1 ? 1 : runs > kNormMaxRuns ? kNormMaxRuns : runs);
}

}  // namespace kda
