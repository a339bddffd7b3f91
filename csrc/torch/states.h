// Pools of states and the indices that select their slots, from tensors: the checks that every op on them shares. Texts
// are made only for errors.
#pragma once
#include "kda/indices.h"
#include "torch/common.h"

namespace kda {

/// A pool is [slots, HV, K, V] (or V, K); `rows`, `cols`: the last two. Slots are contiguous and do not overlap, the
/// distance between them is free. `slots` below zero: any number of them.
inline void require_states(char const* op, char const* name, Tensor const& x, int64_t slots, int64_t value_heads,
                           int64_t rows, int64_t cols) {
  bool const same = x.dim() == 4 && (slots < 0 || x.size(0) == slots) && x.size(1) == value_heads &&
                    x.size(2) == rows && x.size(3) == cols;
  if (!same) require_shape(op, name, x, {slots < 0 && x.dim() ? x.size(0) : slots, value_heads, rows, cols});
  bool const contiguous = (cols == 1 || x.stride(3) == 1) && (rows == 1 || x.stride(2) == cols) &&
                          (value_heads == 1 || x.stride(1) == rows * cols);
  if (!contiguous || (x.size(0) > 1 && x.stride(0) < value_heads * rows * cols))
    bad_argument(
        op, std::string(name) + " is strided inside a slot, or its slots overlap: expected only the slots strided");
}

/// The forms of indices: [rows], [rows, columns], or either.
enum class IndexForm { kRows, kColumns, kEither };

inline Indices indices(char const* op, char const* name, Tensor const& x, int64_t rows, IndexForm form) {
  int64_t const rank = x.dim();
  bool const fits = (rank == 1 && form != IndexForm::kColumns) || (rank == 2 && form != IndexForm::kRows);
  if (!fits || x.size(0) != rows) {
    std::string const n = std::to_string(rows);
    bad_argument(op, std::string(name) + " has shape " + shape_text(x) + ", expected " +
                         (form == IndexForm::kRows      ? "[" + n + "]"
                          : form == IndexForm::kColumns ? "[" + n + ", columns]"
                                                        : "[" + n + "] or [" + n + ", columns]"));
  }
  if (rank == 2 && x.size(1) > 1 && x.stride(1) != 1)
    bad_argument(op, std::string(name) + " is strided in its last dimension, expected it contiguous");
  return {x.data_ptr(), is_int64(op, name, x), x.stride(0), rank == 2 ? int32_t(x.size(1)) : 1};
}
inline Indices indices(char const* op, char const* name, OptionalTensor const& x, int64_t rows, IndexForm form) {
  return x ? indices(op, name, *x, rows, form) : Indices{};
}

}  // namespace kda
