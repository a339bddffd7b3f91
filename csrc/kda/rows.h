// Rows of a tensor [batch, tokens, heads, columns] in global memory.
#pragma once
#include <cstdint>

namespace kda {

/// Elements between neighbours; the last dimension is contiguous.
struct RowStrides {
  int64_t batch, token, head;
};

/// One tensor of tokens. It is read through, or written; which one, its owner says.
struct Rows {
  void* data;  // null: absent
  RowStrides strides;
  bool is_fp32;    // else the element type of the call
  bool in_pieces;  // 16 bytes can be moved at once
};

}  // namespace kda
