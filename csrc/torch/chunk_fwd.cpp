// torch.ops.kda_cuda.chunk_fwd
#include "kda/chunk_fwd/dispatch.h"
#include "platform/device.h"
#include "torch/common.h"

namespace kda {
namespace {

constexpr char const* kOp = "chunk_fwd";

/// Strides of [B, T, H, ...]; the last dimension must be contiguous.
TokenStrides token_strides(char const* name, Tensor const& x) {
  require(x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1, kOp,
          std::string(name) + " is strided in its last dimension, expected it contiguous");
  return {x.stride(0), x.stride(1), x.stride(2)};
}

/// Whether `elements` neighbours can be moved at once anywhere in the rows.
bool aligned(Tensor const& x, int64_t elements) {
  int64_t const bytes = elements * int64_t(x.element_size());
  bool ok = reinterpret_cast<uintptr_t>(x.data_ptr()) % uintptr_t(bytes) == 0 && x.size(3) % elements == 0;
  for (int64_t d = 0; d < 3; ++d) ok = ok && (x.size(d) <= 1 || x.stride(d) % elements == 0);
  return ok;
}

StateType state_type(Tensor const& x, char const* name) {
  switch (dtype_of_tensor(kOp, name, x)) {
    case Dtype::kFloat32:
      return StateType::kFloat32;
    case Dtype::kBfloat16:
      return StateType::kBfloat16;
    default:
      return StateType::kFloat16;
  }
}

void set_streams(ChunkFwdParams& p, Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g,
                 Tensor const& beta, Tensor const& o) {
  auto const [batch, tokens, heads, key_dim] = std::array{q.size(0), q.size(1), q.size(2), q.size(3)};
  int64_t const value_heads = v.size(2), value_dim = v.size(3);
  require_shape(kOp, "k", k, {batch, tokens, heads, key_dim});
  require_shape(kOp, "v", v, {batch, tokens, value_heads, value_dim});
  require_shape(kOp, "g", g, {batch, tokens, value_heads, key_dim});
  require_shape(kOp, "beta", beta, {batch, tokens, value_heads});
  require(heads > 0 && value_heads % heads == 0, kOp, "v has a number of heads that is no multiple of q's");
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.g = g.data_ptr(), p.beta = beta.data_ptr();
  p.o = o.data_ptr();
  p.q_strides = token_strides("q", q), p.k_strides = token_strides("k", k), p.v_strides = token_strides("v", v);
  p.g_strides = token_strides("g", g), p.o_strides = token_strides("o", o);
  p.beta_strides = {beta.stride(0), beta.stride(1), beta.stride(2)};
  p.g_is_fp32 = g.scalar_type() == ScalarType::Float, p.beta_is_fp32 = beta.scalar_type() == ScalarType::Float;
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kOp, "q, k and v differ in dtype");
  require(p.g_is_fp32 || g.scalar_type() == q.scalar_type(), kOp, "g has neither the dtype of q nor float32");
  require(p.beta_is_fp32 || beta.scalar_type() == q.scalar_type(), kOp, "beta has neither the dtype of q nor float32");
  p.q_pairs_aligned = aligned(q, 2), p.k_pairs_aligned = aligned(k, 2), p.g_pairs_aligned = aligned(g, 2);
  int64_t const piece = 16 / int64_t(v.element_size());
  p.v_pieces_aligned = aligned(v, piece), p.o_pieces_aligned = aligned(o, piece);
  p.heads = int32_t(heads), p.value_heads = int32_t(value_heads);
  p.key_dim = int32_t(key_dim), p.value_dim = int32_t(value_dim);
}

void set_plan(ChunkFwdParams& p, Tensor const& q, OptionalTensor const& cu_seqlens, int chunk) {
  p.plan = {q.size(1), int32_t(q.size(0)), nullptr, false, chunk};
  if (!cu_seqlens) return;
  require(q.size(0) == 1, kOp, "q has shape " + shape_text(q) + ", expected B=1 with cu_seqlens");
  require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->is_contiguous(), kOp,
          "cu_seqlens has shape " + shape_text(*cu_seqlens) + ", expected [N+1], contiguous");
  p.plan.sequences = int32_t(cu_seqlens->size(0) - 1);
  p.plan.cu_seqlens = cu_seqlens->data_ptr();
  p.plan.cu_seqlens_is_int64 = cu_seqlens->scalar_type() == ScalarType::Long;
}

/// Rows of the kept states. Variable lengths must be known to the host: where the caller does not say how many rows
/// there are, this is the one synchronisation of the op.
int64_t chunk_state_rows(ChunkPlan const& plan, OptionalTensor const& cu_seqlens, int64_t chunk_size) {
  if (!cu_seqlens) return (plan.tokens + chunk_size - 1) / chunk_size;
  Tensor const host = torch::stable::to(*cu_seqlens, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  ChunkPlan kept = plan;
  kept.cu_seqlens = host.data_ptr();
  kept.chunk = int32_t(chunk_size);
  int64_t rows = 0;
  for (int32_t n = 0; n < plan.sequences; ++n) rows += kept.chunks_of(kept.sequence(n).length);
  return rows;
}

StateRef state_ref(Tensor const& x, char const* name, bool value_first) {
  return {x.data_ptr(), nullptr, x.size(0), x.stride(0), state_type(x, name), value_first};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> chunk_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, OptionalTensor A_log,
                                             OptionalTensor dt_bias, OptionalTensor initial_state,
                                             OptionalTensor cu_seqlens, double scale, bool use_qk_l2norm, bool use_gate,
                                             bool use_beta_sigmoid, bool allow_neg_eigval,
                                             std::optional<double> lower_bound, bool state_v_first,
                                             bool output_final_state, int64_t chunk_size, bool output_chunk_states,
                                             std::optional<int64_t> known_state_rows) {
  for (auto const& [name, x, rank] :
       {std::tuple{"q", &q, 4}, {"k", &k, 4}, {"v", &v, 4}, {"g", &g, 4}, {"beta", &beta, 3}})
    require(x->dim() == rank, kOp,
            std::string(name) + " has shape " + shape_text(*x) + ", expected " + std::to_string(rank) + " dimensions");
  Dtype const dtype = dtype_of_tensor(kOp, "q", q);
  require(q.size(3) >= 1 && q.size(3) <= 256, kOp, "q has shape " + shape_text(q) + ", expected 1 <= K <= 256");
  OnDeviceOf device(q);
  ChunkFwdVariant const* variant =
      select_chunk_fwd(dtype, int(q.size(3)), int(chunk_size), {has_wgmma(), shared_memory_limit()});
  require(variant, kOp, "this device has too little shared memory per block");

  ChunkFwdParams p{};
  Tensor o = torch::stable::new_empty(v, v.sizes());
  set_streams(p, q, k, v, g, beta, o);
  set_plan(p, q, cu_seqlens, variant->chunk);
  p.scale = float(scale);
  p.l2norm = use_qk_l2norm, p.beta_sigmoid = use_beta_sigmoid, p.neg_eigval = allow_neg_eigval;
  if (A_log) require_shape(kOp, "A_log", *A_log, {p.value_heads});
  if (dt_bias) require_shape(kOp, "dt_bias", *dt_bias, {p.value_heads, p.key_dim});
  p.gate = {!use_gate     ? GateKind::kLogDecay
            : lower_bound ? GateKind::kBounded
                          : GateKind::kSoftplus,
            optional_floats(kOp, "A_log", A_log), optional_floats(kOp, "dt_bias", dt_bias),
            float(lower_bound.value_or(0))};

  int64_t const rows = state_v_first ? p.value_dim : p.key_dim, cols = state_v_first ? p.key_dim : p.value_dim;
  Tensor initial;
  if (initial_state) {
    require_shape(kOp, "initial_state", *initial_state, {p.plan.sequences, p.value_heads, rows, cols});
    initial = torch::stable::contiguous(*initial_state);
    p.initial_state = state_ref(initial, "initial_state", state_v_first);
  }
  Tensor final_state = torch::stable::new_empty(q, {0}, ScalarType::Float);
  if (output_final_state) {
    final_state = torch::stable::new_empty(q, {p.plan.sequences, p.value_heads, rows, cols}, ScalarType::Float);
    p.final_state = state_ref(final_state, "final_state", state_v_first);
  }
  Tensor h = torch::stable::new_empty(k, {0});
  if (output_chunk_states) {
    int64_t const kept =
        cu_seqlens && known_state_rows ? *known_state_rows : chunk_state_rows(p.plan, cu_seqlens, chunk_size);
    require(kept >= 0, kOp, "chunk_state_rows is negative");
    h = torch::stable::new_empty(k, {q.size(0), kept, p.value_heads, rows, cols});
    p.chunk_states = h.data_ptr(), p.chunk_state_rows = q.size(0) * kept, p.chunk_states_type = state_type(h, "h");
    p.chunk_state_tokens = int32_t(chunk_size), p.chunk_states_value_first = state_v_first;
  }
  int64_t const bytes = int64_t(variant->workspace_bytes(p.plan, p.value_heads));
  Tensor const workspace = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  p.workspace = workspace.data_ptr();
  if (p.plan.sequences > 0) variant->launch(p, device.stream());
  return {o, final_state, h};
}

}  // namespace kda

KDA_TORCH_IMPL(m) { m.impl("chunk_fwd", TORCH_BOX(&kda::chunk_fwd)); }
