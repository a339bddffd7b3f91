// torch.ops.kda_cuda.chunk_bwd: every gradient of chunk_fwd, or those that are asked for.
#include "kda/chunk_bwd/dispatch.h"
#include "kda/chunk_bwd/wanted.h"
#include "platform/device.h"
#include "torch/chunk_arguments.h"

namespace kda {
namespace {

constexpr char const* kOp = "chunk_bwd";

/// The gradients in the order of the op's arguments; those that are not wanted are empty.
struct Gradients {
  Tensor q, k, v, g, beta, A_log, dt_bias, initial_state;
};

/// Allocates gradients like the arguments.
struct Allocation {
  Tensor const& owner;
  Wanted wanted;
  bool all_zero;      // nothing depends on anything
  bool without_gate;  // nothing depends on its parameters

  Tensor none(ScalarType dtype) const { return empty(owner, {0}, dtype); }
  Tensor tokens(Wanted::Gradient of, Tensor const& x) const {
    if (!wanted.any(of)) return none(x.scalar_type());
    return all_zero ? torch::stable::new_zeros(x, x.sizes()) : empty(x, x.sizes());
  }
  Tensor optional(Wanted::Gradient of, OptionalTensor const& x) const {
    if (!x || !wanted.any(of)) return none(ScalarType::Float);
    bool const zero = all_zero || (without_gate && of != Wanted::kInitialState);
    return zero ? torch::stable::new_zeros(*x, x->sizes()) : empty(*x, x->sizes());
  }
  Gradients gradients(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g, Tensor const& beta,
                      OptionalTensor const& A_log, OptionalTensor const& dt_bias,
                      OptionalTensor const& initial_state) const {
    return {tokens(Wanted::kQ, q),
            tokens(Wanted::kK, k),
            tokens(Wanted::kV, v),
            tokens(Wanted::kG, g),
            tokens(Wanted::kBeta, beta),
            optional(Wanted::kALog, A_log),
            optional(Wanted::kDtBias, dt_bias),
            optional(Wanted::kInitialState, initial_state)};
  }
};

Rows rows_if(char const* name, Tensor const& x, bool wanted) { return wanted ? rows_of(kOp, name, x) : Rows{}; }
float* floats_if(Tensor const& x, bool wanted) { return wanted ? static_cast<float*>(x.data_ptr()) : nullptr; }

/// Where the kernels leave the gradients; what they need besides lives as long as this.
struct Destinations {
  Tensor dx, dq, dk, w, l;  // ChunkBwdScratch

  void set(ChunkBwdParams& p, Gradients const& d, Wanted wanted, ChunkBwdVariant const& variant, bool use_gate) {
    ChunkBwdScratch const needs(
        wanted, {p.key_dim, p.value_dim, variant.chunk, variant.element_bytes(), p.value_heads != p.heads});
    if (needs.dx) dx = scratch(d.v, p, p.value_dim, std::nullopt);
    if (needs.dq) dq = scratch(d.q, p, p.key_dim, ScalarType::Float), p.dq_sum = d.q.data_ptr();
    if (needs.dk) dk = scratch(d.k, p, p.key_dim, ScalarType::Float), p.dk_sum = d.k.data_ptr();
    if (needs.w) w = scratch(d.k, p, p.key_dim, std::nullopt), p.w = rows_of(kOp, "w", w);
    if (needs.l) l = scratch(d.q, p, variant.chunk, std::nullopt), p.l = rows_of(kOp, "l", l);
    p.dv = rows_if("dv", needs.dx ? dx : d.v, wanted.any(Wanted::kOfTokens));
    p.dq = rows_if("dq", needs.dq ? dq : d.q, wanted.any(Wanted::kQ));
    p.dk = rows_if("dk", needs.dk ? dk : d.k, wanted.any(Wanted::kK));
    p.dg = rows_if("dg", d.g, wanted.any(Wanted::kG)), p.dbeta = rows_if("dbeta", d.beta, wanted.any(Wanted::kBeta));
    if (!use_gate) return;
    p.dA_log = floats_if(d.A_log, wanted.any(Wanted::kALog));
    p.ddt_bias = floats_if(d.dt_bias, wanted.any(Wanted::kDtBias));
  }

 private:
  static Tensor scratch(Tensor const& like, ChunkBwdParams const& p, int64_t columns, std::optional<ScalarType> dtype) {
    int64_t const batch = p.plan.cu_seqlens ? 1 : p.plan.sequences;
    return empty(like, {batch, p.plan.tokens, p.value_heads, columns}, dtype);
  }
};

/// A state argument, contiguous, and how the kernels see it. `kept` keeps its memory.
StateRef state_of(char const* name, OptionalTensor const& x, Tensor& kept, ChunkInputs const& p, bool v_first) {
  if (!x) return {};
  int64_t const rows = v_first ? p.value_dim : p.key_dim, cols = v_first ? p.key_dim : p.value_dim;
  require_shape(kOp, name, *x, {p.plan.sequences, p.value_heads, rows, cols});
  kept = torch::stable::contiguous(*x);
  return states_in(kOp, name, kept, p, v_first);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_bwd(
    Tensor d_o, OptionalTensor dfinal_state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, OptionalTensor A_log,
    OptionalTensor dt_bias, OptionalTensor initial_state, OptionalTensor cu_seqlens, double scale, bool use_qk_l2norm,
    bool use_gate, bool use_beta_sigmoid, bool allow_neg_eigval, std::optional<double> lower_bound, bool state_v_first,
    int64_t, int64_t wanted_bits, bool batch_invariant) {
  Streams const streams{kOp, q, k, v, g, beta};
  streams.check();
  require_device_of(kOp, "q", q,
                    {{"do", &d_o},
                     {"dfinal_state", if_given(dfinal_state)},
                     {"A_log", if_given(A_log)},
                     {"dt_bias", if_given(dt_bias)},
                     {"initial_state", if_given(initial_state)},
                     {"cu_seqlens", if_given(cu_seqlens)}});
  require_shape(kOp, "do", d_o, {v.size(0), v.size(1), v.size(2), v.size(3)});
  require(d_o.scalar_type() == v.scalar_type(), kOp, "do differs from v in dtype");
  OnDeviceOf device(q);
  DeviceTraits const traits = device_traits();
  Wanted wanted{wanted_bits};
  wanted.drop_unless(A_log.has_value(), Wanted::kALog), wanted.drop_unless(dt_bias.has_value(), Wanted::kDtBias);
  wanted.drop_unless(initial_state.has_value(), Wanted::kInitialState);

  ChunkBwdVariant const* const variant = select_chunk_bwd(dtype_of_tensor(kOp, "q", q), int(q.size(3)), traits);
  require(variant, kOp, "this device has too little shared memory per block");
  ChunkBwdParams p{};
  streams.set(p);
  set_plan(kOp, p, q, cu_seqlens, variant->chunk);
  Transforms{scale, use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound, A_log, dt_bias}.set(kOp,
                                                                                                                  p);
  p.batch_invariant = batch_invariant;  // holds anyway: nothing is divided by what a sequence is batched with
  bool const in_rows = d_o.numel() == 0 || d_o.stride(3) == 1 || d_o.size(3) <= 1;
  Tensor const d_output = in_rows ? d_o : torch::stable::contiguous(d_o);
  p.d_o = rows_of(kOp, "do", d_output);

  require(2 * int64_t(value_tiles(p.value_dim)) <= 65535, kOp,
          [&] { return "v has shape " + shape_text(v) + ", expected V <= 2097088, which grids of blocks have"; });
  bool const nothing = p.plan.sequences == 0 || p.value_dim == 0;
  Allocation const allocation{q, wanted, nothing, !use_gate};
  Gradients const d = allocation.gradients(q, k, v, g, beta, A_log, dt_bias, initial_state);
  Destinations to;
  to.set(p, d, wanted, *variant, use_gate);
  Tensor initial, d_final;
  p.initial_state = state_of("initial_state", initial_state, initial, p, state_v_first);
  p.d_final_state = state_of("dfinal_state", dfinal_state, d_final, p, state_v_first);
  if (d.initial_state.numel()) p.d_initial_state = states_in(kOp, "initial_state", d.initial_state, p, state_v_first);

  ChunkBwdSchedule const schedule = schedule_chunk_bwd(*variant, p.plan, p.value_heads, p.value_dim, traits);
  Tensor const workspace = empty(q, {int64_t(schedule.workspace_bytes)}, ScalarType::Byte);
  p.workspace = workspace.data_ptr();
  if (wanted.bits && !nothing) variant->launch(p, schedule, device.stream());
  return {d.q, d.k, d.v, d.g, d.beta, d.A_log, d.dt_bias, d.initial_state};
}

}  // namespace kda

KDA_TORCH_IMPL(m) { m.impl("chunk_bwd", TORCH_BOX(&kda::chunk_bwd)); }
