// torch.ops.kda_cuda.decode and decode_commit. A step is a few microseconds: texts are made only for errors, nothing is
// allocated, and nothing but the launch talks to the driver.
#include "kda/decode/dispatch.h"
#include "torch/decode_arguments.h"

namespace kda {
namespace {

void decode_op(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, OptionalTensor A_log, OptionalTensor dt_bias,
               Tensor out, OptionalTensor state, OptionalTensor slot_of, OptionalTensor new_state,
               OptionalTensor new_slot_of, OptionalTensor num_accepted_tokens, OptionalTensor cu_seqlens,
               OptionalTensor parent_token, OptionalTensor record_k, OptionalTensor record_u, OptionalTensor record_g,
               double scale, bool use_qk_l2norm, bool use_gate, bool use_beta_sigmoid, bool allow_neg_eigval,
               std::optional<double> lower_bound, bool state_v_first, bool in_place, bool state_per_token,
               bool zero_is_null) {
  char const* op = "decode";
  DecodeParams p{};
  set_streams(op, p, q, k, v, g, beta, out);
  require_device_of(op, "q", q,
                    {{"A_log", if_given(A_log)},
                     {"dt_bias", if_given(dt_bias)},
                     {"state", if_given(state)},
                     {"slot_of", if_given(slot_of)},
                     {"new_state", if_given(new_state)},
                     {"new_slot_of", if_given(new_slot_of)},
                     {"num_accepted_tokens", if_given(num_accepted_tokens)},
                     {"cu_seqlens", if_given(cu_seqlens)},
                     {"parent_token", if_given(parent_token)},
                     {"record_k", if_given(record_k)},
                     {"record_u", if_given(record_u)},
                     {"record_g", if_given(record_g)}});
  set_sequences(op, p, q, cu_seqlens);
  p.gate = gate_params(op, p, A_log, dt_bias, use_gate, lower_bound);
  p.scale = float(scale);
  p.l2norm = use_qk_l2norm, p.beta_sigmoid = use_beta_sigmoid, p.neg_eigval = allow_neg_eigval;
  p.value_first = state_v_first, p.zero_is_null = zero_is_null, p.every_token = state_per_token;
  set_states(op, p, state, slot_of, new_state, new_slot_of, in_place);
  if (state_per_token && !p.new_state.slot_of.data)
    bad_argument(op, "state_per_token is True, expected a slot for the state after each token");
  set_parents(op, p, parent_token, q.size(0));
  if (parent_token && p.new_state.data && (in_place || !state_per_token))
    bad_argument(op,
                 "parent_token is given and a last state would be written, expected records, or state_per_token with "
                 "new_state");
  set_records(op, p, record_k, record_u, record_g, q.size(0));
  if (num_accepted_tokens && !p.state.slot_of.data)
    bad_argument(op, "num_accepted_tokens is given, expected slot_of [N, columns] with it");
  p.accepted = indices(op, "num_accepted_tokens", num_accepted_tokens, p.sequences, IndexForm::kRows);
  OnDeviceOf device(q);
  decode(p, device.stream());
}

void decode_commit_op(Tensor state, OptionalTensor slot_of, OptionalTensor new_state, OptionalTensor new_slot_of,
                      Tensor record_k, Tensor record_u, Tensor record_g, OptionalTensor num_accepted_tokens,
                      OptionalTensor cu_seqlens, OptionalTensor parent_token, OptionalTensor accepted_token,
                      bool state_v_first, bool zero_is_null) {
  char const* op = "decode_commit";
  require_device_of(op, "state", state,
                    {{"slot_of", if_given(slot_of)},
                     {"new_state", if_given(new_state)},
                     {"new_slot_of", if_given(new_slot_of)},
                     {"record_k", &record_k},
                     {"record_u", &record_u},
                     {"record_g", &record_g},
                     {"num_accepted_tokens", if_given(num_accepted_tokens)},
                     {"cu_seqlens", if_given(cu_seqlens)},
                     {"parent_token", if_given(parent_token)},
                     {"accepted_token", if_given(accepted_token)}});
  check_rank(op, "record_k", record_k, 4), check_rank(op, "record_u", record_u, 4);
  DecodeCommitParams p{};
  p.heads = int32_t(record_k.size(2)), p.value_heads = int32_t(record_u.size(2));
  p.key_dim = int32_t(record_k.size(3)), p.value_dim = int32_t(record_u.size(3));
  if (p.key_dim < 1 || p.key_dim > 256) bad_tensor(op, "record_k", record_k, "1 <= K <= 256");
  if (p.heads < 1 || p.value_heads < 1 || p.value_heads % p.heads)
    bad_argument(op, "record_u has a number of heads that is no multiple of record_k's");
  p.value_first = state_v_first, p.zero_is_null = zero_is_null;
  set_sequences(op, p, record_k, cu_seqlens);
  set_records(op, p, record_k, record_u, record_g, record_k.size(0));
  set_states(op, p, state, slot_of, new_state, new_slot_of, !new_state);
  set_parents(op, p, parent_token, record_k.size(0));
  if (bool(num_accepted_tokens) == bool(parent_token) || bool(accepted_token) != bool(parent_token))
    bad_argument(op, "expected num_accepted_tokens, or parent_token and accepted_token");
  p.accepted = parent_token ? indices(op, "accepted_token", accepted_token, p.sequences, IndexForm::kRows)
                            : indices(op, "num_accepted_tokens", num_accepted_tokens, p.sequences, IndexForm::kRows);
  OnDeviceOf device(state);
  decode_commit(p, device.stream());
}

#if defined(KDA_EMULATE)
/// What any op of decode's schema costs: the yardstick of bench_host_overhead.py. Its schema is defined there.
void decode_empty_op(Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, Tensor, OptionalTensor,
                     OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                     OptionalTensor, OptionalTensor, OptionalTensor, double, bool, bool, bool, bool,
                     std::optional<double>, bool, bool, bool, bool) {}
#endif

}  // namespace
}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("decode", TORCH_BOX(&kda::decode_op));
  m.impl("decode_commit", TORCH_BOX(&kda::decode_commit_op));
#if defined(KDA_EMULATE)
  m.impl("decode_empty", TORCH_BOX(&kda::decode_empty_op));
#endif
}
