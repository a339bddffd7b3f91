// How every operation finds the variant that serves a call. The file of a variant describes it: describe_OPERATION. The
// operation's dispatch.h lists the descriptions, OPERATION_variants(), and chooses one, select_OPERATION.
#pragma once
#include <vector>

#include "kda/dtype.h"

namespace kda {

/// The tile of K that holds key_dim channels and is not twice too wide.
inline int key_tile_of(int key_dim) { return key_dim <= 64 ? 64 : key_dim <= 128 ? 128 : 256; }

/// The first variant of a table that serves. Null: none.
template <class Variant, class Serves>
Variant const* first_variant(std::vector<Variant> const& table, Serves serves) {
  for (Variant const& variant : table)
    if (serves(variant)) return &variant;
  return nullptr;
}

/// The variant for an element type, of an operation that has one for each.
template <class Variant>
Variant const& variant_of(std::vector<Variant> const& table, Dtype dtype) {
  return *first_variant(table, [&](Variant const& variant) { return variant.dtype == dtype; });
}

}  // namespace kda
