// torch.ops.kda_cuda.short_conv_fwd and short_conv_bwd.
#include "kda/short_conv/dispatch.h"

#include <array>

#include "torch/elements.h"

namespace kda {
namespace {

constexpr int64_t kMostChannels = 65535 * 32;  // so that blocks are counted in 32 bits

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

/// Streams side by side: those of a call, their outputs, or gradients of either. Absent ones are empty.
struct Streams {
  std::array<Tensor, kConvStreams> of;

  /// With contiguous rows.
  static Streams given(Tensor const& x, OptionalTensor const& x2, OptionalTensor const& x3) {
    auto const empty = torch::stable::new_empty(x, {0});
    return {{with_contiguous_rows(x), x2 ? with_contiguous_rows(*x2) : empty, x3 ? with_contiguous_rows(*x3) : empty}};
  }
  Streams new_like() const {
    auto const made = [](Tensor const& x) { return torch::stable::new_empty(x, x.sizes()); };
    return {{made(of[0]), made(of[1]), made(of[2])}};
  }
  static bool is_there(Tensor const& x) { return x.dim() == 3; }
  static int64_t channels_of(Tensor const& x) { return is_there(x) ? x.size(2) : 0; }
  int64_t channels() const { return channels_of(of[0]) + channels_of(of[1]) + channels_of(of[2]); }
  bool move_in_pieces() const {
    bool all = true;
    for (Tensor const& x : of) all = all && (!is_there(x) || moves_in_pieces(x));
    return all;
  }
  void set(ConvStreams& rows) const {
    for (int i = 0; i < kConvStreams; ++i) rows[i] = is_there(of[i]) ? channel_rows(of[i]) : ChannelRows{};
  }
};

/// A call after its checks, and the tensors that it points into.
struct ConvCall {
  Tensor const& x;  // the first stream
  Streams xs;
  Tensor weight;
  OptionalTensor bias, cu_seqlens;
  ShortConvCall p{};
  int64_t sequences;

  ConvCall(char const* op, Tensor const& first, OptionalTensor const& x2, OptionalTensor const& x3,
           Tensor const& given_weight, OptionalTensor const& given_bias, OptionalTensor const& initial_state,
           OptionalTensor const& given_cu_seqlens, bool silu)
      : x(first), weight(given_weight), bias(given_bias), cu_seqlens(given_cu_seqlens) {
    require(x.dim() == 3, op, "x has shape " + shape_text(x) + ", expected [B, T, D]");
    require_beside(op, "x2", x2), require_beside(op, "x3", x3);
    require(x2 || !x3, op, "x2 is None and x3 is not, expected both or x2 alone");
    xs = Streams::given(x, x2, x3);
    require_device_of(op, "x", x,
                      {{"x2", if_given(x2)},
                       {"x3", if_given(x3)},
                       {"weight", &weight},
                       {"bias", if_given(bias)},
                       {"initial_state", if_given(initial_state)},
                       {"cu_seqlens", if_given(cu_seqlens)}});
    int64_t const channels = xs.channels();
    require(channels >= 1 && channels <= kMostChannels, op,
            "x has shape " + shape_text(x) + " and D=" + std::to_string(channels) +
                " channels in all, expected [B, T, D] with 1 <= D <= " + std::to_string(kMostChannels));
    require(weight.dim() == 2 && weight.size(0) == channels && weight.size(1) >= 2 && weight.size(1) <= 8, op,
            "weight has shape " + shape_text(weight) + ", expected [" + std::to_string(channels) + ", 2 to 8]");
    dtype_of_tensor(op, "x", x);
    p.weight_dtype = dtype_of_tensor(op, "weight", weight);
    if (bias) {
      require_shape(op, "bias", *bias, {channels});
      require(bias->scalar_type() == weight.scalar_type(), op, "bias has another dtype than weight");
      bias = torch::stable::contiguous(*bias);
    }
    weight = torch::stable::contiguous(weight);
    p.channels = int32_t(channels), p.taps = int32_t(weight.size(1));
    p.activation = silu ? Activation::kSilu : Activation::kNone;
    p.in_pieces = xs.move_in_pieces();
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
    xs.set(p.x);
    int32_t end = 0;
    for (int i = 0; i < kConvStreams; ++i) p.stream_end[i] = end += int32_t(Streams::channels_of(xs.of[i]));
    p.weight = weight.data_ptr(), p.bias = bias ? bias->data_ptr() : nullptr;
  }

 private:
  void require_beside(char const* op, char const* name, OptionalTensor const& y) const {
    if (!y) return;
    require(
        y->dim() == 3 && y->size(0) == x.size(0) && y->size(1) == x.size(1) && y->size(2) >= 1, op,
        std::string(name) + " has shape " + shape_text(*y) + " and x " + shape_text(x) + ", expected equal B and T");
    require(y->scalar_type() == x.scalar_type(), op, std::string(name) + " has another dtype than x");
  }
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

std::tuple<Tensor, Tensor, Tensor, Tensor> short_conv_fwd(Tensor x, OptionalTensor x2, OptionalTensor x3, Tensor weight,
                                                          OptionalTensor bias, OptionalTensor initial_state,
                                                          OptionalTensor cu_seqlens, bool silu,
                                                          bool output_final_state) {
  char const* op = "short_conv_fwd";
  OnDeviceOf device(x);
  ConvCall call(op, x, x2, x3, weight, bias, initial_state, cu_seqlens, silu);
  Tensor const& owner = initial_state ? *initial_state : x;
  Streams const y = call.xs.new_like();
  Tensor final_state = torch::stable::new_empty(x, {0});
  if (output_final_state)
    final_state = torch::stable::new_empty(owner, {call.sequences, call.p.channels, call.p.taps - 1});
  if (call.is_empty()) {
    if (output_final_state) copy_or_zero(final_state, initial_state);
    return {y.of[0], y.of[1], y.of[2], final_state};
  }
  call.set_pointers();
  ShortConvFwdParams p{call.p, {}, {}};
  y.set(p.y);
  p.in_pieces = p.in_pieces && y.move_in_pieces();
  if (output_final_state) p.final_state = conv_states(op, "final_state", final_state);
  ShortConvVariant const& variant = select_short_conv(dtype_of_tensor(op, "x", x));
  variant.plan_fwd(p, call.batch_tokens());
  variant.fwd(p, device.stream());
  return {y.of[0], y.of[1], y.of[2], final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> short_conv_bwd(
    Tensor dy, OptionalTensor dy2, OptionalTensor dy3, OptionalTensor dfinal_state, Tensor x, OptionalTensor x2,
    OptionalTensor x3, Tensor weight, OptionalTensor bias, OptionalTensor initial_state, OptionalTensor cu_seqlens,
    bool silu) {
  char const* op = "short_conv_bwd";
  OnDeviceOf device(x);
  ConvCall call(op, x, x2, x3, weight, bias, initial_state, cu_seqlens, silu);
  require_device_of(
      op, "x", x,
      {{"dy", &dy}, {"dy2", if_given(dy2)}, {"dy3", if_given(dy3)}, {"dfinal_state", if_given(dfinal_state)}});
  require_like(op, "dy", dy, "x", x);
  require(bool(dy2) == bool(x2) && bool(dy3) == bool(x3), op, "expected a gradient for each stream");
  if (x2) require_like(op, "dy2", *dy2, "x2", *x2);
  if (x3) require_like(op, "dy3", *dy3, "x3", *x3);
  auto const like_or_none = [&](OptionalTensor const& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0});
  };
  Streams const dx = call.xs.new_like();
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  Tensor dbias = like_or_none(bias), dstate = like_or_none(initial_state);
  ConvStates const d_final = dfinal_state ? call.checked_states(op, "dfinal_state", *dfinal_state) : ConvStates{};
  if (call.is_empty()) {
    torch::stable::zero_(dweight), torch::stable::zero_(dbias);
    if (initial_state) copy_or_zero(dstate, dfinal_state);
    return {dx.of[0], dx.of[1], dx.of[2], dweight, dbias, dstate};
  }
  call.set_pointers();
  Streams const dys = Streams::given(dy, dy2, dy3);
  ShortConvBwdParams p{call.p, {}, {}, d_final};
  dys.set(p.dy), dx.set(p.dx);
  p.in_pieces = p.in_pieces && dys.move_in_pieces() && dx.move_in_pieces();
  if (initial_state) p.d_initial_state = conv_states(op, "initial_state", dstate);
  p.dweight = dweight.data_ptr(), p.dbias = bias ? dbias.data_ptr() : nullptr;
  ShortConvVariant const& variant = select_short_conv(dtype_of_tensor(op, "x", x));
  variant.plan_bwd(p, call.batch_tokens());
  Tensor const partial = torch::stable::new_empty(x, {p.run_blocks, p.taps + 1, p.channels}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  variant.bwd(p, device.stream());
  return {dx.of[0], dx.of[1], dx.of[2], dweight, dbias, dstate};
}

}  // namespace
}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("short_conv_fwd", TORCH_BOX(&kda::short_conv_fwd));
  m.impl("short_conv_bwd", TORCH_BOX(&kda::short_conv_bwd));
}
