// Arguments that the chunkwise ops share, from tensors: checks, and what the kernels are told.
#pragma once
#include "kda/chunk/inputs.h"
#include "kda/chunk/shape.h"
#include "torch/states.h"

namespace kda {

/// A tensor [B, T, H, ...] whose last dimension must be contiguous; of three dimensions, the last is that of the heads.
inline Rows rows_of(char const* op, char const* name, Tensor const& x) {
  bool const is_fp32 = x.scalar_type() == ScalarType::Float;
  if (x.dim() == 3) return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}, is_fp32, false};
  require(x.numel() == 0 || x.size(3) <= 1 || x.stride(3) == 1, op,
          [&] { return std::string(name) + " is strided in its last dimension, expected it contiguous"; });
  int64_t const elements = 16 / int64_t(x.element_size());
  bool in_pieces = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.size(3) % elements == 0;
  for (int64_t d = 0; d < 3; ++d) in_pieces = in_pieces && (x.size(d) <= 1 || x.stride(d) % elements == 0);
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2)}, is_fp32, in_pieces};
}

/// The five inputs of an op.
struct Streams {
  char const* op;
  Tensor const &q, &k, &v, &g, &beta;

  void check() const {
    require_device_of(op, "q", q, {{"k", &k}, {"v", &v}, {"g", &g}, {"beta", &beta}});
    for (auto const& [name, x, rank] :
         {std::tuple{"q", &q, 4}, {"k", &k, 4}, {"v", &v, 4}, {"g", &g, 4}, {"beta", &beta, 3}})
      if (x->dim() != rank)
        bad_argument(op, std::string(name) + " has shape " + shape_text(*x) + ", expected " + std::to_string(rank) +
                             " dimensions");
    auto const [batch, tokens, heads, key_dim] = std::array{q.size(0), q.size(1), q.size(2), q.size(3)};
    int64_t const value_heads = v.size(2), value_dim = v.size(3);
    require(key_dim >= 1 && key_dim <= 256, op,
            [&] { return "q has shape " + shape_text(q) + ", expected 1 <= K <= 256"; });
    require_shape(op, "k", k, {batch, tokens, heads, key_dim});
    require_shape(op, "v", v, {batch, tokens, value_heads, value_dim});
    require_shape(op, "g", g, {batch, tokens, value_heads, key_dim});
    require_shape(op, "beta", beta, {batch, tokens, value_heads});
    require(value_heads <= 65535 && value_dim <= 65535 * kValueTile, op, [&] {
      return "v has shape " + shape_text(v) + ", expected HV <= 65535 and V <= 4194240, which grids of blocks have";
    });
    require(heads > 0 && value_heads > 0 && value_heads % heads == 0, op,
            "v has a number of heads that is no multiple of q's");
    ScalarType const dtype = q.scalar_type();
    require(k.scalar_type() == dtype && v.scalar_type() == dtype, op, "q, k and v differ in dtype");
    for (auto const& [name, x] : {std::pair{"g", &g}, {"beta", &beta}})
      if (x->scalar_type() != ScalarType::Float && x->scalar_type() != dtype)
        bad_argument(op, std::string(name) + " has neither the dtype of q nor float32");
  }

  void set(ChunkInputs& p) const {
    p.q = rows_of(op, "q", q), p.k = rows_of(op, "k", k), p.v = rows_of(op, "v", v), p.g = rows_of(op, "g", g);
    p.beta = rows_of(op, "beta", beta);
    p.heads = int32_t(q.size(2)), p.value_heads = int32_t(v.size(2));
    p.key_dim = int32_t(q.size(3)), p.value_dim = int32_t(v.size(3));
  }
};

/// What is done to the inputs before the recurrence.
struct Transforms {
  double scale;
  bool l2norm, gate, beta_sigmoid, neg_eigval;
  std::optional<double> lower_bound;
  OptionalTensor const &A_log, &dt_bias;

  void set(char const* op, ChunkInputs& p) const {
    p.scale = float(scale), p.l2norm = l2norm, p.beta_sigmoid = beta_sigmoid, p.neg_eigval = neg_eigval;
    if (A_log) require_shape(op, "A_log", *A_log, {p.value_heads});
    if (dt_bias) require_shape(op, "dt_bias", *dt_bias, {p.value_heads, p.key_dim});
    p.gate = {!gate         ? GateKind::kLogDecay
              : lower_bound ? GateKind::kBounded
                            : GateKind::kSoftplus,
              optional_floats(op, "A_log", A_log), optional_floats(op, "dt_bias", dt_bias),
              float(lower_bound.value_or(0))};
  }
};

inline void set_plan(char const* op, ChunkInputs& p, Tensor const& q, OptionalTensor const& cu_seqlens, int chunk) {
  int64_t sequences = q.size(0);
  p.plan.tokens = q.size(1), p.plan.chunk = chunk;
  if (cu_seqlens) {
    require(q.size(0) == 1, op, [&] { return "q has shape " + shape_text(q) + ", expected B=1 with cu_seqlens"; });
    require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->is_contiguous(), op,
            [&] { return "cu_seqlens has shape " + shape_text(*cu_seqlens) + ", expected [N+1], contiguous"; });
    sequences = cu_seqlens->size(0) - 1;
    p.plan.cu_seqlens = cu_seqlens->data_ptr();
    p.plan.cu_seqlens_is_int64 = is_int64(op, "cu_seqlens", *cu_seqlens);
  }
  p.plan.sequences = int32_t(sequences);
  int64_t const most = INT32_MAX - 2;  // blocks in a row of a grid, and two ranges that no sequence owns
  require(sequences <= most && p.plan.cells() <= most, op, [&] {
    return "q has shape " + shape_text(q) + ", expected less than 2^31 sequences and less than 2^31 chunks";
  });
}

/// States [slots, HV, K, V] (V, K) with contiguous slots.
inline StateRef states_in(char const* op, char const* name, Tensor const& x, ChunkInputs const& p, bool value_first) {
  int64_t const rows = value_first ? p.value_dim : p.key_dim, cols = value_first ? p.key_dim : p.value_dim;
  require_states(op, name, x, -1, p.value_heads, rows, cols);
  return {x.data_ptr(), {{}, x.size(0), false}, x.stride(0), dtype_of_tensor(op, name, x), value_first};
}

}  // namespace kda
