// The gate by itself: forward, and backward with the gradients of its parameters.
#pragma once
#include <cstdint>

#include "kda/dtype.h"
#include "kda/gate.h"

namespace kda {

/// A tensor [rows0, rows1, value_heads, key_dim] in any layout; strides in elements.
struct GateTensor {
  void* data;
  Dtype dtype;
  int64_t stride[4];
};

struct KdaGateParams {
  GateTensor g;
  GateTensor y;   // forward: the result; backward: its gradient (read)
  GateTensor dg;  // backward: the gradient of g
  int64_t rows0, rows1;
  int32_t value_heads, key_dim;
  GateParams gate;
  float* dA_log;       // [value_heads]; null: not wanted
  float* ddt_bias;     // [value_heads, key_dim]; null: not wanted
  float* partial;      // backward: [2, row_blocks, value_heads, key_dim]
  int32_t row_blocks;  // the rows are cut into so many runs; their sums are added in order, so bits never vary
};

inline constexpr int kGateThreads = 256, kGateMaxRowBlocks = 128;

inline int gate_row_blocks(int64_t rows) {
  int64_t const blocks = (rows + 31) / 32;
  return int(blocks < 1 ? 1 : blocks > kGateMaxRowBlocks ? kGateMaxRowBlocks : blocks);
}

}  // namespace kda
