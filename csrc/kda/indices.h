// Integers that only the device knows, and what they select: slots of a pool of states.
#pragma once
#include <cstdint>

#include "platform/platform.h"

namespace kda {

/// [rows] or [rows, columns], int32 or int64.
struct Indices {
  void const* data;  // null: absent
  bool is_int64;
  int64_t row_stride;
  int32_t columns;

  KDA_DEVICE int64_t at(int64_t row, int64_t column = 0) const {
    int64_t const i = row * row_stride + column;
    return is_int64 ? static_cast<int64_t const*>(data)[i] : static_cast<int32_t const*>(data)[i];
  }
};

/// Which slots of a pool belong to a sequence. Whatever the indices contain, a slot lies inside the pool or is null.
struct Slots {
  Indices index;      // [sequences] or [sequences, columns]; absent: sequence n has slot n
  int64_t count;      // an index beyond it is a null slot, as every negative one is
  bool zero_is_null;  // slot 0 too

  /// Negative: the null slot.
  KDA_DEVICE int64_t of(int64_t sequence, int64_t column = 0) const {
    int64_t const slot = index.data ? index.at(sequence, column) : sequence;
    return slot < int64_t(zero_is_null) || slot >= count ? -1 : slot;
  }
};

}  // namespace kda
