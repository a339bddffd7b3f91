// torch.ops.kda_cuda.chunk_fwd and prefill: the same kernels, with states in tensors of their own or in a pool.
#include "kda/chunk_fwd/dispatch.h"
#include "platform/device.h"
#include "torch/states.h"

namespace kda {
namespace {

constexpr int64_t kCheckpointTokens = 64;  // checkpoints are multiples of this apart; every variant's chunk divides it

/// Strides of [B, T, H, ...]; the last dimension must be contiguous.
TokenStrides token_strides(char const* op, char const* name, Tensor const& x) {
  require(x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1, op,
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

/// The five inputs of an op.
struct Streams {
  char const* op;
  Tensor const &q, &k, &v, &g, &beta;

  void check() const {
    require_device_of(op, "q", q, {{"k", &k}, {"v", &v}, {"g", &g}, {"beta", &beta}});
    for (auto const& [name, x, rank] :
         {std::tuple{"q", &q, 4}, {"k", &k, 4}, {"v", &v, 4}, {"g", &g, 4}, {"beta", &beta, 3}})
      require(
          x->dim() == rank, op,
          std::string(name) + " has shape " + shape_text(*x) + ", expected " + std::to_string(rank) + " dimensions");
    auto const [batch, tokens, heads, key_dim] = std::array{q.size(0), q.size(1), q.size(2), q.size(3)};
    int64_t const value_heads = v.size(2), value_dim = v.size(3);
    require(key_dim >= 1 && key_dim <= 256, op, "q has shape " + shape_text(q) + ", expected 1 <= K <= 256");
    require_shape(op, "k", k, {batch, tokens, heads, key_dim});
    require_shape(op, "v", v, {batch, tokens, value_heads, value_dim});
    require_shape(op, "g", g, {batch, tokens, value_heads, key_dim});
    require_shape(op, "beta", beta, {batch, tokens, value_heads});
    require(value_heads <= 65535 && value_dim <= 65535 * kValueTile, op,
            "v has shape " + shape_text(v) + ", expected HV <= 65535 and V <= 4194240, which grids of blocks have");
    require(heads > 0 && value_heads % heads == 0, op, "v has a number of heads that is no multiple of q's");
    ScalarType const dtype = q.scalar_type();
    require(k.scalar_type() == dtype && v.scalar_type() == dtype, op, "q, k and v differ in dtype");
    for (auto const& [name, x] : {std::pair{"g", &g}, {"beta", &beta}})
      require(x->scalar_type() == ScalarType::Float || x->scalar_type() == dtype, op,
              std::string(name) + " has neither the dtype of q nor float32");
  }

  void set(ChunkFwdParams& p, Tensor const& o) const {
    p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.g = g.data_ptr(), p.beta = beta.data_ptr();
    p.o = o.data_ptr();
    p.q_strides = token_strides(op, "q", q), p.k_strides = token_strides(op, "k", k);
    p.v_strides = token_strides(op, "v", v), p.g_strides = token_strides(op, "g", g);
    p.o_strides = token_strides(op, "o", o), p.beta_strides = {beta.stride(0), beta.stride(1), beta.stride(2)};
    p.g_is_fp32 = g.scalar_type() == ScalarType::Float, p.beta_is_fp32 = beta.scalar_type() == ScalarType::Float;
    auto const in_pieces = [](Tensor const& x) { return aligned(x, 16 / int64_t(x.element_size())); };
    p.q_pieces_aligned = in_pieces(q), p.k_pieces_aligned = in_pieces(k), p.v_pieces_aligned = in_pieces(v);
    p.g_pieces_aligned = in_pieces(g), p.o_pieces_aligned = in_pieces(o);
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

  void set(char const* op, ChunkFwdParams& p) const {
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

void set_plan(char const* op, ChunkFwdParams& p, Tensor const& q, OptionalTensor const& cu_seqlens, int chunk) {
  int64_t sequences = q.size(0);
  p.plan.tokens = q.size(1), p.plan.chunk = chunk;
  if (cu_seqlens) {
    require(q.size(0) == 1, op, "q has shape " + shape_text(q) + ", expected B=1 with cu_seqlens");
    require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && cu_seqlens->is_contiguous(), op,
            "cu_seqlens has shape " + shape_text(*cu_seqlens) + ", expected [N+1], contiguous");
    sequences = cu_seqlens->size(0) - 1;
    p.plan.cu_seqlens = cu_seqlens->data_ptr();
    p.plan.cu_seqlens_is_int64 = is_int64(op, "cu_seqlens", *cu_seqlens);
  }
  p.plan.sequences = int32_t(sequences);
  int64_t const most = INT32_MAX - 2;  // blocks in a row of a grid, and two ranges that no sequence owns
  require(sequences <= most && p.plan.slots() <= most, op,
          "q has shape " + shape_text(q) + ", expected less than 2^31 sequences and less than 2^31 chunks");
}

/// Checks the inputs, chooses the variant and says everything but states, output and workspace.
ChunkFwdVariant const& plan_call(ChunkFwdParams& p, Streams const& streams, Transforms const& transforms,
                                 OptionalTensor const& cu_seqlens, Tensor const& o, int64_t state_tokens) {
  ChunkFwdVariant const* variant = select_chunk_fwd(dtype_of_tensor(streams.op, "q", streams.q), int(streams.q.size(3)),
                                                    int(state_tokens), {has_wgmma(), shared_memory_limit()});
  require(variant, streams.op, "this device has too little shared memory per block");
  streams.set(p, o);
  set_plan(streams.op, p, streams.q, cu_seqlens, variant->chunk);
  transforms.set(streams.op, p);
  return *variant;
}

/// The caller's workspace, or one of our own.
Tensor workspace_for(char const* op, ChunkFwdParams const& p, ChunkFwdVariant const& variant, Tensor const& q,
                     OptionalTensor const& given) {
  int64_t const bytes = int64_t(variant.workspace_bytes(ChunkFwdCall(p)));
  if (!given) return torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  require(given->scalar_type() == ScalarType::Byte && given->dim() == 1 && given->is_contiguous(), op,
          "workspace has shape " + shape_text(*given) + ", expected uint8, 1 dimension, contiguous");
  require(given->size(0) >= bytes, op,
          "workspace has " + std::to_string(given->size(0)) + " bytes, expected at least " + std::to_string(bytes));
  require(reinterpret_cast<uintptr_t>(given->data_ptr()) % 16 == 0, op, "workspace is not aligned to 16 bytes");
  return *given;
}

StateType state_type(char const* op, char const* name, Tensor const& x) {
  switch (dtype_of_tensor(op, name, x)) {
    case Dtype::kFloat32:
      return StateType::kFloat32;
    case Dtype::kBfloat16:
      return StateType::kBfloat16;
    default:
      return StateType::kFloat16;
  }
}

/// States [slots, HV, K, V] (V, K) with contiguous slots.
StateRef states_in(char const* op, char const* name, Tensor const& x, ChunkFwdParams const& p, bool value_first) {
  int64_t const rows = value_first ? p.value_dim : p.key_dim, cols = value_first ? p.key_dim : p.value_dim;
  require_states(op, name, x, -1, p.value_heads, rows, cols);
  return {x.data_ptr(), {{}, x.size(0), false}, x.stride(0), state_type(op, name, x), value_first};
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

/// Every sequence starts from its slot of the pool and leaves its final state there.
void set_pool(char const* op, ChunkFwdParams& p, Tensor const& pool, OptionalTensor const& slot_of,
              OptionalTensor const& initial_slot_of, OptionalTensor const& has_initial_state, bool value_first,
              bool zero_is_null) {
  int64_t const sequences = p.plan.sequences;
  p.final_state = states_in(op, "state_pool", pool, p, value_first);
  if (slot_of) {
    p.final_state.slots.index = indices(op, "slot_of", *slot_of, sequences, IndexForm::kRows);
    p.final_state.slots.zero_is_null = zero_is_null;
  } else {
    require(pool.size(0) >= sequences, op,
            "state_pool has shape " + shape_text(pool) + ", expected a slot for each of " + std::to_string(sequences) +
                " sequences without slot_of");
  }
  p.initial_state = p.final_state;
  if (initial_slot_of) {
    p.initial_state.slots.index = indices(op, "initial_slot_of", *initial_slot_of, sequences, IndexForm::kRows);
    p.initial_state.slots.zero_is_null = zero_is_null;
  }
  if (has_initial_state) {
    require_shape(op, "has_initial_state", *has_initial_state, {sequences});
    require(has_initial_state->scalar_type() == ScalarType::Bool && has_initial_state->is_contiguous(), op,
            "has_initial_state is not a contiguous bool tensor");
    p.has_initial_state = static_cast<bool const*>(has_initial_state->data_ptr());
  }
  p.plan.state_slots = p.final_state.slots;
  p.clear_unowned = p.plan.tokens > 0 && (slot_of || p.plan.cu_seqlens);
}

void set_checkpoints(char const* op, ChunkFwdParams& p, Tensor const& pool, Tensor const& slots, int64_t interval,
                     bool value_first, bool zero_is_null) {
  require(interval > 0 && interval % kCheckpointTokens == 0 && interval <= INT32_MAX, op,
          "checkpoint_interval is " + std::to_string(interval) + ", expected a positive multiple of " +
              std::to_string(kCheckpointTokens));
  p.checkpoints = states_in(op, "checkpoint_pool", pool, p, value_first);
  p.checkpoints.slots.index = indices(op, "checkpoint_slots", slots, p.plan.sequences, IndexForm::kColumns);
  p.checkpoints.slots.zero_is_null = zero_is_null;
  p.checkpoint_tokens = int32_t(interval);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> chunk_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, OptionalTensor A_log,
                                             OptionalTensor dt_bias, OptionalTensor initial_state,
                                             OptionalTensor cu_seqlens, double scale, bool use_qk_l2norm, bool use_gate,
                                             bool use_beta_sigmoid, bool allow_neg_eigval,
                                             std::optional<double> lower_bound, bool state_v_first,
                                             bool output_final_state, int64_t chunk_size, bool output_chunk_states,
                                             std::optional<int64_t> known_state_rows, bool batch_invariant) {
  constexpr char const* kOp = "chunk_fwd";
  Streams const streams{kOp, q, k, v, g, beta};
  streams.check();
  require_device_of(kOp, "q", q,
                    {{"A_log", if_given(A_log)},
                     {"dt_bias", if_given(dt_bias)},
                     {"initial_state", if_given(initial_state)},
                     {"cu_seqlens", if_given(cu_seqlens)}});
  OnDeviceOf device(q);
  ChunkFwdParams p{};
  Tensor o = torch::stable::new_empty(v, v.sizes());
  Transforms const transforms{scale,       use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval,
                              lower_bound, A_log,         dt_bias};
  ChunkFwdVariant const& variant = plan_call(p, streams, transforms, cu_seqlens, o, chunk_size);
  p.batch_invariant = batch_invariant;

  int64_t const rows = state_v_first ? p.value_dim : p.key_dim, cols = state_v_first ? p.key_dim : p.value_dim;
  Tensor initial;
  if (initial_state) {
    require_shape(kOp, "initial_state", *initial_state, {p.plan.sequences, p.value_heads, rows, cols});
    initial = torch::stable::contiguous(*initial_state);
    p.initial_state = states_in(kOp, "initial_state", initial, p, state_v_first);
  }
  Tensor final_state = torch::stable::new_empty(q, {0}, ScalarType::Float);
  if (output_final_state) {
    final_state = torch::stable::new_empty(q, {p.plan.sequences, p.value_heads, rows, cols}, ScalarType::Float);
    p.final_state = states_in(kOp, "final_state", final_state, p, state_v_first);
  }
  Tensor h = torch::stable::new_empty(k, {0});
  if (output_chunk_states) {
    int64_t const kept =
        cu_seqlens && known_state_rows ? *known_state_rows : chunk_state_rows(p.plan, cu_seqlens, chunk_size);
    require(kept >= 0, kOp, "chunk_state_rows is negative");
    h = torch::stable::new_empty(k, {q.size(0), kept, p.value_heads, rows, cols});
    p.chunk_states = states_in(kOp, "h", torch::stable::flatten(h, 0, 1), p, state_v_first);
    p.chunk_state_tokens = int32_t(chunk_size);
  }
  Tensor const workspace = workspace_for(kOp, p, variant, q, std::nullopt);
  p.workspace = workspace.data_ptr();
  if (p.plan.sequences > 0) variant.launch(p, device.stream());
  return {o, final_state, h};
}

Tensor prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, OptionalTensor A_log, OptionalTensor dt_bias,
               Tensor state_pool, OptionalTensor slot_of, OptionalTensor initial_slot_of,
               OptionalTensor has_initial_state, OptionalTensor checkpoint_pool, OptionalTensor checkpoint_slots,
               OptionalTensor cu_seqlens, OptionalTensor workspace, double scale, bool use_qk_l2norm, bool use_gate,
               bool use_beta_sigmoid, bool allow_neg_eigval, std::optional<double> lower_bound, bool state_v_first,
               bool zero_is_null, int64_t checkpoint_interval, bool batch_invariant) {
  constexpr char const* kOp = "prefill";
  Streams const streams{kOp, q, k, v, g, beta};
  streams.check();
  require_device_of(kOp, "q", q,
                    {{"A_log", if_given(A_log)},
                     {"dt_bias", if_given(dt_bias)},
                     {"state_pool", &state_pool},
                     {"slot_of", if_given(slot_of)},
                     {"initial_slot_of", if_given(initial_slot_of)},
                     {"has_initial_state", if_given(has_initial_state)},
                     {"checkpoint_pool", if_given(checkpoint_pool)},
                     {"checkpoint_slots", if_given(checkpoint_slots)},
                     {"cu_seqlens", if_given(cu_seqlens)},
                     {"workspace", if_given(workspace)}});
  OnDeviceOf device(q);
  ChunkFwdParams p{};
  Tensor o = torch::stable::new_empty(v, v.sizes());
  Transforms const transforms{scale,       use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval,
                              lower_bound, A_log,         dt_bias};
  ChunkFwdVariant const& variant = plan_call(p, streams, transforms, cu_seqlens, o, kCheckpointTokens);
  p.batch_invariant = batch_invariant;
  set_pool(kOp, p, state_pool, slot_of, initial_slot_of, has_initial_state, state_v_first, zero_is_null);
  if (checkpoint_slots)
    set_checkpoints(kOp, p, checkpoint_pool ? *checkpoint_pool : state_pool, *checkpoint_slots, checkpoint_interval,
                    state_v_first, zero_is_null);
  Tensor const scratch = workspace_for(kOp, p, variant, q, workspace);
  p.workspace = scratch.data_ptr();
  if (p.plan.sequences > 0) variant.launch(p, device.stream());
  return o;
}

}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("chunk_fwd", TORCH_BOX(&kda::chunk_fwd));
  m.impl("prefill", TORCH_BOX(&kda::prefill));
}
