// torch.ops.kda_cuda.chunk_fwd and prefill: the same kernels, with states in tensors of their own or in a pool.
#include "kda/chunk_fwd/dispatch.h"
#include "platform/device.h"
#include "torch/chunk_arguments.h"

namespace kda {
namespace {

constexpr int64_t kCheckpointTokens = 64;  // checkpoints are multiples of this apart; every variant's chunk divides it

/// Checks the inputs, chooses the variant and says everything but states, output and workspace.
ChunkFwdVariant const& plan_call(ChunkFwdParams& p, Streams const& streams, Transforms const& transforms,
                                 OptionalTensor const& cu_seqlens, Tensor const& o, int64_t state_tokens,
                                 DeviceTraits const& traits) {
  ChunkFwdVariant const* variant =
      select_chunk_fwd(dtype_of_tensor(streams.op, "q", streams.q), int(streams.q.size(3)), int(state_tokens), traits);
  require(variant, streams.op, "this device has too little shared memory per block");
  streams.set(p), p.o = rows_of(streams.op, "o", o);
  set_plan(streams.op, p, streams.q, cu_seqlens, variant->chunk);
  transforms.set(streams.op, p);
  return *variant;
}

/// The caller's workspace, or one of our own.
Tensor workspace_for(char const* op, ChunkFwdSchedule const& schedule, Tensor const& q, OptionalTensor const& given) {
  int64_t const bytes = int64_t(schedule.workspace.bytes());
  if (!given) return empty(q, {bytes}, ScalarType::Byte);
  require(given->scalar_type() == ScalarType::Byte && given->dim() == 1 && given->is_contiguous(), op,
          [&] { return "workspace has shape " + shape_text(*given) + ", expected uint8, 1 dimension, contiguous"; });
  require(given->size(0) >= bytes, op, [&] {
    return "workspace has " + std::to_string(given->size(0)) + " bytes, expected at least " + std::to_string(bytes);
  });
  require(reinterpret_cast<uintptr_t>(given->data_ptr()) % 16 == 0, op, "workspace is not aligned to 16 bytes");
  return *given;
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
    require(pool.size(0) >= sequences, op, [&] {
      return "state_pool has shape " + shape_text(pool) + ", expected a slot for each of " + std::to_string(sequences) +
             " sequences without slot_of";
    });
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
  require(interval > 0 && interval % kCheckpointTokens == 0 && interval <= INT32_MAX, op, [&] {
    return "checkpoint_interval is " + std::to_string(interval) + ", expected a positive multiple of " +
           std::to_string(kCheckpointTokens);
  });
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
  DeviceTraits const traits = device_traits();
  ChunkFwdParams p{};
  Tensor o = empty(v, v.sizes());
  Transforms const transforms{scale,       use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval,
                              lower_bound, A_log,         dt_bias};
  ChunkFwdVariant const& variant = plan_call(p, streams, transforms, cu_seqlens, o, chunk_size, traits);
  p.batch_invariant = batch_invariant;
  p.clear_unowned = p.plan.tokens > 0 && p.plan.cu_seqlens;

  int64_t const rows = state_v_first ? p.value_dim : p.key_dim, cols = state_v_first ? p.key_dim : p.value_dim;
  Tensor initial;
  if (initial_state) {
    require_shape(kOp, "initial_state", *initial_state, {p.plan.sequences, p.value_heads, rows, cols});
    initial = torch::stable::contiguous(*initial_state);
    p.initial_state = states_in(kOp, "initial_state", initial, p, state_v_first);
  }
  Tensor const final_state = output_final_state
                                 ? empty(q, {p.plan.sequences, p.value_heads, rows, cols}, ScalarType::Float)
                                 : empty(q, {0}, ScalarType::Float);
  if (output_final_state) p.final_state = states_in(kOp, "final_state", final_state, p, state_v_first);
  Tensor h;
  if (!output_chunk_states) {
    h = empty(k, {0});
  } else {
    int64_t const kept =
        cu_seqlens && known_state_rows ? *known_state_rows : chunk_state_rows(p.plan, cu_seqlens, chunk_size);
    require(kept >= 0, kOp, "chunk_state_rows is negative");
    h = empty(k, {q.size(0), kept, p.value_heads, rows, cols});
    p.chunk_states = states_in(kOp, "h", torch::stable::flatten(h, 0, 1), p, state_v_first);
    p.chunk_state_tokens = int32_t(chunk_size);
  }
  ChunkFwdSchedule const schedule = schedule_chunk_fwd(variant, ChunkFwdCall(p), traits);
  Tensor const workspace = workspace_for(kOp, schedule, q, std::nullopt);
  p.workspace = workspace.data_ptr();
  if (p.plan.sequences > 0) variant.launch(p, schedule, device.stream());
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
  DeviceTraits const traits = device_traits();
  ChunkFwdParams p{};
  Tensor o = empty(v, v.sizes());
  Transforms const transforms{scale,       use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval,
                              lower_bound, A_log,         dt_bias};
  ChunkFwdVariant const& variant = plan_call(p, streams, transforms, cu_seqlens, o, kCheckpointTokens, traits);
  p.batch_invariant = batch_invariant;
  set_pool(kOp, p, state_pool, slot_of, initial_slot_of, has_initial_state, state_v_first, zero_is_null);
  if (checkpoint_slots)
    set_checkpoints(kOp, p, checkpoint_pool ? *checkpoint_pool : state_pool, *checkpoint_slots, checkpoint_interval,
                    state_v_first, zero_is_null);
  ChunkFwdSchedule const schedule = schedule_chunk_fwd(variant, ChunkFwdCall(p), traits);
  Tensor const scratch = workspace_for(kOp, schedule, q, workspace);
  p.workspace = scratch.data_ptr();
  if (p.plan.sequences > 0) variant.launch(p, schedule, device.stream());
  return o;
}

}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("chunk_fwd", TORCH_BOX(&kda::chunk_fwd));
  m.impl("prefill", TORCH_BOX(&kda::prefill));
}
