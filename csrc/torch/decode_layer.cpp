// torch.ops.kda_cuda.decode_layer
#include "kda/decode_layer/dispatch.h"
#include "torch/decode_arguments.h"

namespace kda {
namespace {

constexpr char const* kLayerOp = "decode_layer";

void const* conv_weight(char const* name, Tensor const& x, int64_t width, ScalarType type) {
  require_shape(kLayerOp, name, x, {width, kConvTaps});
  if (!x.is_contiguous()) bad_argument(kLayerOp, std::string(name) + " is not contiguous");
  if (x.scalar_type() != type) bad_argument(kLayerOp, std::string(name) + " has another dtype than q_conv_weight");
  return x.data_ptr();
}

ShortConvParams conv_params(DecodeParams const& p, Tensor const& q, Tensor const& state, Tensor const& q_weight,
                            Tensor const& k_weight, Tensor const& v_weight, bool with_slots) {
  int64_t const width = int64_t(p.heads) * p.key_dim;
  ScalarType const weight_type = q_weight.scalar_type();
  ShortConvParams conv{};
  conv.weight[0] = conv_weight("q_conv_weight", q_weight, width, weight_type);
  conv.weight[1] = conv_weight("k_conv_weight", k_weight, width, weight_type);
  conv.weight[2] = conv_weight("v_conv_weight", v_weight, width, weight_type);
  conv.weight_is_fp32 = is_fp32(kLayerOp, "q_conv_weight", q_weight, q.scalar_type());
  check_rank(kLayerOp, "conv_state", state, 3);
  require_shape(kLayerOp, "conv_state", state,
                {with_slots ? state.size(0) : int64_t(p.sequences), 3 * width, kConvTaps - 1});
  conv.state_is_fp32 = is_fp32(kLayerOp, "conv_state", state, q.scalar_type());
  conv.state = state.data_ptr(), conv.slots = state.size(0);
  conv.slot_stride = state.stride(0), conv.channel_stride = state.stride(1), conv.tap_stride = state.stride(2);
  return conv;
}

void decode_layer_op(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, Tensor conv_state,
                     Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight, OptionalTensor A_log,
                     OptionalTensor dt_bias, Tensor norm_weight, Tensor state, OptionalTensor slot_of, Tensor out,
                     double scale, bool allow_neg_eigval, std::optional<double> lower_bound, double norm_eps,
                     bool zero_is_null) {
  DecodeLayerParams p{};
  DecodeParams& step = p.step;
  set_streams(kLayerOp, step, q, k, v, g, beta, out);
  require_device_of(kLayerOp, "q", q,
                    {{"output_gate", &output_gate},
                     {"conv_state", &conv_state},
                     {"q_conv_weight", &q_conv_weight},
                     {"k_conv_weight", &k_conv_weight},
                     {"v_conv_weight", &v_conv_weight},
                     {"A_log", if_given(A_log)},
                     {"dt_bias", if_given(dt_bias)},
                     {"norm_weight", &norm_weight},
                     {"state", &state},
                     {"slot_of", if_given(slot_of)}});
  int64_t const heads = step.heads, dim = step.key_dim;
  require_shape(kLayerOp, "q", q, {q.size(0), 1, heads, dim});
  require_shape(kLayerOp, "v", v, {q.size(0), 1, heads, dim});
  set_sequences(kLayerOp, step, q, std::nullopt);
  step.gate = gate_params(kLayerOp, step, A_log, dt_bias, true, lower_bound);
  step.scale = float(scale);
  step.l2norm = step.beta_sigmoid = step.value_first = true;
  step.neg_eigval = allow_neg_eigval, step.zero_is_null = zero_is_null;
  set_states(kLayerOp, step, state, slot_of, std::nullopt, std::nullopt, true);
  p.conv = conv_params(step, q, conv_state, q_conv_weight, k_conv_weight, v_conv_weight, bool(slot_of));
  require_shape(kLayerOp, "output_gate", output_gate, {q.size(0), 1, heads, dim});
  if (output_gate.scalar_type() != q.scalar_type()) bad_argument(kLayerOp, "output_gate has another dtype than q");
  p.output_gate = output_gate.data_ptr();
  p.output_gate_strides = row_strides(kLayerOp, "output_gate", output_gate);
  require_shape(kLayerOp, "norm_weight", norm_weight, {dim});
  if (!norm_weight.is_contiguous()) bad_argument(kLayerOp, "norm_weight is not contiguous");
  p.norm_weight = norm_weight.data_ptr();
  p.norm_weight_is_fp32 = is_fp32(kLayerOp, "norm_weight", norm_weight, q.scalar_type());
  p.norm_eps = float(norm_eps);
  OnDeviceOf device(q);
  decode_layer(p, device.stream());
}

}  // namespace
}  // namespace kda

KDA_TORCH_IMPL(m) { m.impl("decode_layer", TORCH_BOX(&kda::decode_layer_op)); }
