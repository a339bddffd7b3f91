// States as the caller keeps them.
#pragma once
#include "kda/dtype.h"
#include "kda/indices.h"

namespace kda {

/// A set of K x V states, for every value head.
struct StateRef {
  void* data;  // [slots, value_heads, key_dim, value_dim] or [..., value_dim, key_dim]; null: absent
  Slots slots;
  int64_t slot_stride;  // elements
  Dtype type;
  bool value_first;  // [..., value_dim, key_dim]
};

}  // namespace kda
