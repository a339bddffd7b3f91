// torch.ops.kda_cuda.short_conv_fwd and short_conv_bwd.
#include "kda/short_conv/dispatch.h"

#include "torch/elements.h"

namespace kda {
namespace {

constexpr int64_t kMostChannels = 65535 * 32;  // the second dimension of a grid

/// Channels are contiguous: a view wherever x has them so.
Tensor with_contiguous_rows(Tensor const& x) {
  return x.size(2) > 1 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x;
}
ChannelRows channel_rows(Tensor const& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
bool moves_in_pieces(Tensor const& x) {
  int64_t const count = 16 / bytes_of(x);
  bool const strides = x.stride(0) % count == 0 && x.stride(1) % count == 0;
  return strides && x.size(2) % count == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

ConvStates conv_states(char const* op, char const* name, Tensor const& x) {
  return {x.data_ptr(), dtype_of_tensor(op, name, x), x.stride(0), x.stride(1), x.stride(2)};
}

/// A call after its checks, and the tensors that it points into.
struct ConvCall {
  Tensor x, weight;
  OptionalTensor bias, cu_seqlens;
  ShortConvCall p{};
  int64_t sequences;

  ConvCall(char const* op, Tensor const& given, Tensor const& given_weight, OptionalTensor const& given_bias,
           OptionalTensor const& initial_state, OptionalTensor const& given_cu_seqlens, bool silu)
      : x(given), weight(given_weight), bias(given_bias), cu_seqlens(given_cu_seqlens) {
    require(x.dim() == 3, op, "x has shape " + shape_text(x) + ", expected [B, T, D]");
    require_device_of(op, "x", x,
                      {{"weight", &weight},
                       {"bias", if_given(bias)},
                       {"initial_state", if_given(initial_state)},
                       {"cu_seqlens", if_given(cu_seqlens)}});
    int64_t const channels = x.size(2);
    require(channels >= 1 && channels <= kMostChannels, op,
            "x has shape " + shape_text(x) + ", expected [B, T, D] with 1 <= D <= " + std::to_string(kMostChannels));
    require(weight.dim() == 2 && weight.size(0) == channels && weight.size(1) >= 2 && weight.size(1) <= 8, op,
            "weight has shape " + shape_text(weight) + ", expected [" + std::to_string(channels) + ", 2 to 8]");
    dtype_of_tensor(op, "x", x);
    p.weight_dtype = dtype_of_tensor(op, "weight", weight);
    if (bias) {
      require_shape(op, "bias", *bias, {channels});
      require(bias->scalar_type() == weight.scalar_type(), op, "bias has another dtype than weight");
      bias = torch::stable::contiguous(*bias);
    }
    x = with_contiguous_rows(x), weight = torch::stable::contiguous(weight);
    p.channels = int32_t(channels), p.taps = int32_t(weight.size(1));
    p.activation = silu ? Activation::kSilu : Activation::kNone;
    p.in_pieces = moves_in_pieces(x);
    set_plan(op);
    if (initial_state) p.initial_state = checked_states(op, "initial_state", *initial_state);
  }

  /// No kernel is needed; with cu_seqlens empty sequences have states.
  bool is_empty() const { return x.size(0) == 0 || (x.size(1) == 0 && !cu_seqlens); }
  int64_t batch_tokens() const { return x.size(0) * x.size(1); }

  ConvStates checked_states(char const* op, char const* name, Tensor const& states) const {
    require_shape(op, name, states, {sequences, p.channels, p.taps - 1});
    return conv_states(op, name, states);
  }
  void set_pointers() {
    p.x = channel_rows(x), p.weight = weight.data_ptr(), p.bias = bias ? bias->data_ptr() : nullptr;
  }

 private:
  void set_plan(char const* op) {
    sequences = x.size(0);
    p.plan.tokens = x.size(1);
    if (cu_seqlens) {
      require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && x.size(0) == 1, op,
              "cu_seqlens has shape " + shape_text(*cu_seqlens) + " and x " + shape_text(x) +
                  ", expected [N+1] with N >= 1, and B=1");
      p.plan.cu_seqlens_is_int64 = is_int64(op, "cu_seqlens", *cu_seqlens);
      cu_seqlens = torch::stable::contiguous(*cu_seqlens);
      p.plan.cu_seqlens = cu_seqlens->data_ptr();
      sequences = cu_seqlens->size(0) - 1;
    }
    p.plan.sequences = int32_t(sequences);
  }
};

/// What a call without tokens leaves behind: the states as they were.
void copy_or_zero(Tensor& to, OptionalTensor const& from) {
  if (from) torch::stable::copy_(to, *from);
  else torch::stable::zero_(to);
}

std::tuple<Tensor, Tensor> short_conv_fwd(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor initial_state,
                                          OptionalTensor cu_seqlens, bool silu, bool output_final_state) {
  char const* op = "short_conv_fwd";
  OnDeviceOf device(x);
  ConvCall call(op, x, weight, bias, initial_state, cu_seqlens, silu);
  Tensor const& owner = initial_state ? *initial_state : x;
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor final_state = torch::stable::new_empty(x, {0});
  if (output_final_state)
    final_state = torch::stable::new_empty(owner, {call.sequences, call.p.channels, call.p.taps - 1});
  if (call.is_empty()) {
    if (output_final_state) copy_or_zero(final_state, initial_state);
    return {y, final_state};
  }
  call.set_pointers();
  ShortConvFwdParams p{call.p, channel_rows(y), {}};
  p.in_pieces = p.in_pieces && moves_in_pieces(y);
  if (output_final_state) p.final_state = conv_states(op, "final_state", final_state);
  ShortConvVariant const& variant = select_short_conv(dtype_of_tensor(op, "x", x));
  variant.plan_fwd(p, call.batch_tokens());
  variant.fwd(p, device.stream());
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> short_conv_bwd(Tensor dy, OptionalTensor dfinal_state, Tensor x,
                                                          Tensor weight, OptionalTensor bias,
                                                          OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                                          bool silu) {
  char const* op = "short_conv_bwd";
  OnDeviceOf device(x);
  ConvCall call(op, x, weight, bias, initial_state, cu_seqlens, silu);
  require_device_of(op, "x", x, {{"dy", &dy}, {"dfinal_state", if_given(dfinal_state)}});
  require_like(op, "dy", dy, "x", x);
  auto const like_or_none = [&](OptionalTensor const& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0});
  };
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dweight = torch::stable::new_empty(weight, weight.sizes());
  Tensor dbias = like_or_none(bias), dstate = like_or_none(initial_state);
  ConvStates const d_final = dfinal_state ? call.checked_states(op, "dfinal_state", *dfinal_state) : ConvStates{};
  if (call.is_empty()) {
    torch::stable::zero_(dweight), torch::stable::zero_(dbias);
    if (initial_state) copy_or_zero(dstate, dfinal_state);
    return {dx, dweight, dbias, dstate};
  }
  call.set_pointers();
  dy = with_contiguous_rows(dy);
  ShortConvBwdParams p{call.p, channel_rows(dy), channel_rows(dx), d_final};
  p.in_pieces = p.in_pieces && moves_in_pieces(dy) && moves_in_pieces(dx);
  if (initial_state) p.d_initial_state = conv_states(op, "initial_state", dstate);
  p.dweight = dweight.data_ptr(), p.dbias = bias ? dbias.data_ptr() : nullptr;
  ShortConvVariant const& variant = select_short_conv(dtype_of_tensor(op, "x", x));
  variant.plan_bwd(p, call.batch_tokens());
  Tensor const partial = torch::stable::new_empty(x, {p.run_blocks, p.taps + 1, p.channels}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  variant.bwd(p, device.stream());
  return {dx, dweight, dbias, dstate};
}

}  // namespace
}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("short_conv_fwd", TORCH_BOX(&kda::short_conv_fwd));
  m.impl("short_conv_bwd", TORCH_BOX(&kda::short_conv_bwd));
}
