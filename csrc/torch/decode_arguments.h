// From tensors to the parameters of the decoding kernels, with every check. Texts are made only for errors.
#pragma once
#include "kda/decode/params.h"
#include "torch/states.h"

namespace kda {

[[noreturn]] inline void bad_tensor(char const* op, char const* name, Tensor const& x, std::string const& expected) {
  bad_argument(op, std::string(name) + " has shape " + shape_text(x) + ", expected " + expected);
}

inline void check_rank(char const* op, char const* name, Tensor const& x, int64_t rank) {
  if (x.dim() != rank) bad_tensor(op, name, x, std::to_string(rank) + " dimensions");
}

/// Strides of [batch, tokens, heads, ...], whose last dimension is contiguous.
inline RowStrides row_strides(char const* op, char const* name, Tensor const& x) {
  if (x.dim() == 4 && x.size(3) > 1 && x.stride(3) != 1)
    bad_argument(op, std::string(name) + " is strided in its last dimension, expected it contiguous");
  return {x.stride(0), x.stride(1), x.stride(2)};
}

inline bool is_fp32(char const* op, char const* name, Tensor const& x, ScalarType otherwise) {
  if (x.scalar_type() == ScalarType::Float) return true;
  if (x.scalar_type() != otherwise) bad_argument(op, std::string(name) + " has neither the dtype of q nor float32");
  return false;
}

/// The pool `x`, whose slots the sequences have by `slots`.
inline StatePool state_pool(char const* op, char const* name, DecodeParams& p, Tensor const& x, char const* slots_name,
                            OptionalTensor const& slots) {
  int64_t const rows = p.value_first ? p.value_dim : p.key_dim, cols = p.value_first ? p.key_dim : p.value_dim;
  require_states(op, name, x, slots ? -1 : p.sequences, p.value_heads, rows, cols);
  p.state_dtype = dtype_of_tensor(op, name, x);
  return {x.data_ptr(), x.size(0), x.stride(0), indices(op, slots_name, slots, p.sequences, IndexForm::kEither)};
}

/// Where states come from and go to.
inline void set_states(char const* op, DecodeParams& p, OptionalTensor const& state, OptionalTensor const& slot_of,
                       OptionalTensor const& new_state, OptionalTensor const& new_slot_of, bool in_place) {
  if (state) p.state = state_pool(op, "state", p, *state, "slot_of", slot_of);
  if (new_state) {
    Dtype const before = p.state_dtype;
    p.new_state = state_pool(op, "new_state", p, *new_state, "new_slot_of", new_slot_of);
    if (state && p.state_dtype != before) bad_argument(op, "new_state has another dtype than state");
  }
  if (!in_place) return;
  if (!state || new_state) bad_argument(op, "in_place is True, expected state and no new_state with it");
  p.new_state = p.state;
}

inline void set_sequences(char const* op, DecodeParams& p, Tensor const& first, OptionalTensor const& cu_seqlens) {
  p.tokens = first.size(1);
  p.sequences = int32_t(first.size(0));
  if (!cu_seqlens) return;
  if (first.size(0) != 1) bad_tensor(op, "q", first, "B=1 with cu_seqlens");
  if (cu_seqlens->dim() != 1 || cu_seqlens->size(0) < 2) bad_tensor(op, "cu_seqlens", *cu_seqlens, "[N+1]");
  p.sequences = int32_t(cu_seqlens->size(0) - 1);
  p.cu_seqlens = indices(op, "cu_seqlens", cu_seqlens, cu_seqlens->size(0), IndexForm::kRows);
}

/// The parent of every token: [batch, tokens].
inline void set_parents(char const* op, DecodeParams& p, OptionalTensor const& parents, int64_t batch) {
  p.parents = indices(op, "parent_token", parents, batch, IndexForm::kColumns);
  if (parents) require_shape(op, "parent_token", *parents, {batch, p.tokens});
}

inline float* record(char const* op, char const* name, OptionalTensor const& x, std::initializer_list<int64_t> shape) {
  if (!x) return nullptr;
  require_shape(op, name, *x, shape);
  if (x->scalar_type() != ScalarType::Float || !x->is_contiguous())
    bad_argument(op, std::string(name) + " is not a contiguous float32 tensor");
  return static_cast<float*>(x->data_ptr());
}

inline void set_records(char const* op, DecodeParams& p, OptionalTensor const& k, OptionalTensor const& u,
                        OptionalTensor const& g, int64_t batch) {
  if (bool(k) != bool(u) || bool(k) != bool(g))
    bad_argument(op, "record_k, record_u and record_g are given in part, expected all or none");
  p.records = {record(op, "record_k", k, {batch, p.tokens, p.heads, p.key_dim}),
               record(op, "record_u", u, {batch, p.tokens, p.value_heads, p.value_dim}),
               record(op, "record_g", g, {batch, p.tokens, p.value_heads, p.key_dim})};
}

/// q, k, v, g, beta and o, and all sizes.
inline void set_streams(char const* op, DecodeParams& p, Tensor const& q, Tensor const& k, Tensor const& v,
                        Tensor const& g, Tensor const& beta, Tensor const& out) {
  require_device_of(op, "q", q, {{"k", &k}, {"v", &v}, {"g", &g}, {"beta", &beta}, {"out", &out}});
  check_rank(op, "q", q, 4), check_rank(op, "v", v, 4);
  int64_t const batch = q.size(0), tokens = q.size(1), heads = q.size(2), key_dim = q.size(3);
  int64_t const value_heads = v.size(2), value_dim = v.size(3);
  require_shape(op, "k", k, {batch, tokens, heads, key_dim});
  require_shape(op, "v", v, {batch, tokens, value_heads, value_dim});
  require_shape(op, "g", g, {batch, tokens, value_heads, key_dim});
  require_shape(op, "beta", beta, {batch, tokens, value_heads});
  require_shape(op, "out", out, {batch, tokens, value_heads, value_dim});
  if (key_dim < 1 || key_dim > 256) bad_tensor(op, "q", q, "1 <= K <= 256");
  if (heads < 1 || value_heads < 1 || value_heads % heads)
    bad_argument(op, "v has a number of heads that is no multiple of q's");
  ScalarType const type = q.scalar_type();
  p.dtype = dtype_of_tensor(op, "q", q);
  if (k.scalar_type() != type || v.scalar_type() != type || out.scalar_type() != type)
    bad_argument(op, "q, k, v and out differ in dtype");
  p.g_is_fp32 = is_fp32(op, "g", g, type), p.beta_is_fp32 = is_fp32(op, "beta", beta, type);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.g = g.data_ptr(), p.beta = beta.data_ptr();
  p.o = out.data_ptr();
  p.q_strides = row_strides(op, "q", q), p.k_strides = row_strides(op, "k", k);
  p.v_strides = row_strides(op, "v", v), p.g_strides = row_strides(op, "g", g);
  p.beta_strides = row_strides(op, "beta", beta), p.o_strides = row_strides(op, "out", out);
  p.heads = int32_t(heads), p.value_heads = int32_t(value_heads);
  p.key_dim = int32_t(key_dim), p.value_dim = int32_t(value_dim);
}

inline GateParams gate_params(char const* op, DecodeParams const& p, OptionalTensor const& A_log,
                              OptionalTensor const& dt_bias, bool use_gate, std::optional<double> lower_bound) {
  if (A_log) require_shape(op, "A_log", *A_log, {p.value_heads});
  if (dt_bias) require_shape(op, "dt_bias", *dt_bias, {p.value_heads, p.key_dim});
  GateKind const kind = !use_gate ? GateKind::kLogDecay : lower_bound ? GateKind::kBounded : GateKind::kSoftplus;
  return {kind, optional_floats(op, "A_log", A_log), optional_floats(op, "dt_bias", dt_bias),
          float(lower_bound.value_or(0))};
}

}  // namespace kda
