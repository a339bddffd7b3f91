// torch.ops.kda_cuda.chunk_bwd: every gradient of chunk_fwd, or those that are asked for.
#include "kda/chunk_bwd/dispatch.h"
#include "platform/device.h"
#include "torch/chunk_arguments.h"

namespace kda {
namespace {

constexpr char const* kOp = "chunk_bwd";

/// Bits of `wanted`.
enum Wanted : int64_t { kQ = 1, kK = 2, kV = 4, kG = 8, kBeta = 16, kALog = 32, kDtBias = 64, kInitialState = 128 };

/// The gradients in the order of the op's arguments; those that are not wanted are empty.
struct Gradients {
  Tensor q, k, v, g, beta, A_log, dt_bias, initial_state;
};

/// Allocates gradients like the arguments.
struct Allocation {
  Tensor const& owner;
  int64_t wanted;
  bool all_zero;      // nothing depends on anything
  bool without_gate;  // nothing depends on its parameters

  Tensor none(ScalarType dtype) const { return torch::stable::new_empty(owner, {0}, dtype); }
  Tensor tokens(Wanted bit, Tensor const& x) const {
    if (!(wanted & bit)) return none(x.scalar_type());
    return all_zero ? torch::stable::new_zeros(x, x.sizes()) : torch::stable::new_empty(x, x.sizes());
  }
  Tensor optional(Wanted bit, OptionalTensor const& x) const {
    if (!x || !(wanted & bit)) return none(ScalarType::Float);
    bool const zero = all_zero || (without_gate && bit != kInitialState);
    return zero ? torch::stable::new_zeros(*x, x->sizes()) : torch::stable::new_empty(*x, x->sizes());
  }
};

Rows rows_if(char const* name, Tensor const& x, bool wanted) { return wanted ? rows_of(kOp, name, x) : Rows{}; }
float* floats_if(Tensor const& x, bool wanted) { return wanted ? static_cast<float*>(x.data_ptr()) : nullptr; }

/// Where the kernels leave the gradients; what they need besides lives as long as this.
struct Destinations {
  Tensor dv, dq, dk;  // scratch: dX where dv is not wanted, and of grouped heads one dq and dk for each value head

  void set(ChunkBwdParams& p, Gradients const& d, int64_t wanted, bool use_gate) {
    bool const of_keys = wanted & (kQ | kK | kG | kALog | kDtBias), of_tokens = of_keys || (wanted & (kV | kBeta));
    if (of_tokens) p.dv = rows_of(kOp, "dv", dv = wanted & kV ? d.v : scratch(d.v, p, p.value_dim, std::nullopt));
    p.dg = rows_if("dg", d.g, wanted & kG), p.dbeta = rows_if("dbeta", d.beta, wanted & kBeta);
    if (use_gate) p.dA_log = floats_if(d.A_log, wanted & kALog), p.ddt_bias = floats_if(d.dt_bias, wanted & kDtBias);
    if (p.value_heads == p.heads) {
      p.dq = rows_if("dq", d.q, wanted & kQ), p.dk = rows_if("dk", d.k, wanted & kK);
      return;
    }
    if (wanted & kQ)
      p.dq = rows_of(kOp, "dq", dq = scratch(d.q, p, p.key_dim, ScalarType::Float)), p.dq_sum = d.q.data_ptr();
    if (wanted & kK)
      p.dk = rows_of(kOp, "dk", dk = scratch(d.k, p, p.key_dim, ScalarType::Float)), p.dk_sum = d.k.data_ptr();
  }

 private:
  static Tensor scratch(Tensor const& like, ChunkBwdParams const& p, int64_t columns, std::optional<ScalarType> dtype) {
    int64_t const batch = p.plan.cu_seqlens ? 1 : p.plan.sequences;
    return torch::stable::new_empty(like, {batch, p.plan.tokens, p.value_heads, columns}, dtype);
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
    int64_t, int64_t wanted, bool batch_invariant) {
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
  if (!A_log) wanted &= ~int64_t(kALog);
  if (!dt_bias) wanted &= ~int64_t(kDtBias);
  if (!initial_state) wanted &= ~int64_t(kInitialState);

  ChunkBwdChoice const choice =
      select_chunk_bwd(dtype_of_tensor(kOp, "q", q), int(q.size(3)), {has_wgmma(), shared_memory_limit()});
  require(choice.backward, kOp, "this device has too little shared memory per block");
  ChunkBwdParams p{};
  streams.set(p);
  set_plan(kOp, p, q, cu_seqlens, choice.backward->chunk);
  Transforms{scale, use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound, A_log, dt_bias}.set(kOp,
                                                                                                                  p);
  p.batch_invariant = batch_invariant;  // holds anyway: nothing is divided by what a sequence is batched with
  bool const in_rows = d_o.numel() == 0 || d_o.stride(3) == 1 || d_o.size(3) <= 1;
  Tensor const d_output = in_rows ? d_o : torch::stable::contiguous(d_o);
  p.d_o = rows_of(kOp, "do", d_output);

  require(2 * int64_t(value_tiles(p.value_dim)) <= 65535, kOp,
          "v has shape " + shape_text(v) + ", expected V <= 2097088, which grids of blocks have");
  bool const nothing = p.plan.sequences == 0 || p.value_dim == 0;
  Allocation const allocate{q, wanted, nothing, !use_gate};
  Gradients d{allocate.tokens(kQ, q),
              allocate.tokens(kK, k),
              allocate.tokens(kV, v),
              allocate.tokens(kG, g),
              allocate.tokens(kBeta, beta),
              allocate.optional(kALog, A_log),
              allocate.optional(kDtBias, dt_bias),
              allocate.optional(kInitialState, initial_state)};
  Destinations to;
  to.set(p, d, wanted, use_gate);
  Tensor initial, d_final;
  p.initial_state = state_of("initial_state", initial_state, initial, p, state_v_first);
  p.d_final_state = state_of("dfinal_state", dfinal_state, d_final, p, state_v_first);
  if (d.initial_state.numel()) p.d_initial_state = states_in(kOp, "initial_state", d.initial_state, p, state_v_first);

  ChunkBwdSchedule const schedule = choice.backward->schedule(p.plan, p.value_heads, p.value_dim);
  Tensor const workspace = torch::stable::new_empty(q, {int64_t(schedule.workspace_bytes)}, ScalarType::Byte);
  p.workspace = workspace.data_ptr();
  if (wanted && !nothing) choice.backward->launch(p, schedule, *choice.forward, device.stream());
  return {d.q, d.k, d.v, d.g, d.beta, d.A_log, d.dt_bias, d.initial_state};
}

}  // namespace kda

KDA_TORCH_IMPL(m) { m.impl("chunk_bwd", TORCH_BOX(&kda::chunk_bwd)); }
