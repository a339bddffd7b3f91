// Checks of tensors that are alike.
#pragma once
#include "torch/common.h"

namespace kda {

inline int64_t bytes_of(Tensor const& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

/// A shape and dtype like those of `first`.
inline void require_like(char const* op, char const* name, Tensor const& x, char const* first_name,
                         Tensor const& first) {
  std::string const shape = shape_text(x), expected = shape_text(first);
  require(shape == expected, op, std::string(name) + " has shape " + shape + ", expected " + expected);
  require(x.scalar_type() == first.scalar_type(), op, std::string(name) + " has another dtype than " + first_name);
}

}  // namespace kda
