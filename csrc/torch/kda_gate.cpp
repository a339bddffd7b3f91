// torch.ops.kda_cuda.kda_gate_fwd and kda_gate_bwd.
#include "kda/kda_gate/dispatch.h"

#include "torch/elements.h"

namespace kda {
namespace {

/// As [rows0, rows1, HV, K]: a view wherever the leading dimensions allow one.
Tensor four_dimensions(Tensor const& x) {
  int64_t const d = x.dim(), heads = x.size(d - 2), channels = x.size(d - 1);
  if (d == 4) return x;
  return torch::stable::reshape(x, {1, -1, heads, channels});
}

GateTensor gate_tensor(char const* op, char const* name, Tensor const& x) {
  return {x.data_ptr(), dtype_of_tensor(op, name, x), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

KdaGateParams gate_params(char const* op, Tensor const& g, OptionalTensor const& A_log, OptionalTensor const& dt_bias,
                          std::optional<double> lower_bound) {
  int64_t const heads = g.size(2), channels = g.size(3);
  if (A_log) require_shape(op, "A_log", *A_log, {heads});
  if (dt_bias) require_shape(op, "dt_bias", *dt_bias, {heads, channels});
  KdaGateParams p{};
  p.g = gate_tensor(op, "g", g);
  p.rows0 = g.size(0), p.rows1 = g.size(1);
  p.value_heads = int32_t(heads), p.key_dim = int32_t(channels);
  p.gate = {lower_bound ? GateKind::kBounded : GateKind::kSoftplus, optional_floats(op, "A_log", A_log),
            optional_floats(op, "dt_bias", dt_bias), float(lower_bound.value_or(0))};
  return p;
}

Tensor kda_gate_fwd(Tensor g, OptionalTensor A_log, OptionalTensor dt_bias, std::optional<double> lower_bound,
                    ScalarType dtype) {
  char const* op = "kda_gate_fwd";
  require(g.dim() >= 2, op, [&] { return "g has shape " + shape_text(g) + ", expected [..., HV, K]"; });
  OnDeviceOf device(g);
  Tensor y = empty(g, g.sizes(), dtype);
  if (g.numel() == 0) return y;
  Tensor const g4 = four_dimensions(g), y4 = four_dimensions(y);
  KdaGateParams p = gate_params(op, g4, A_log, dt_bias, lower_bound);
  p.y = gate_tensor(op, "dtype", y4);
  select_kda_gate(p.g.dtype).fwd(p, device.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> kda_gate_bwd(Tensor dy, Tensor g, OptionalTensor A_log, OptionalTensor dt_bias,
                                                std::optional<double> lower_bound) {
  char const* op = "kda_gate_bwd";
  require(g.dim() >= 2, op, [&] { return "g has shape " + shape_text(g) + ", expected [..., HV, K]"; });
  require(shape_text(dy) == shape_text(g), op,
          [&] { return "dy has shape " + shape_text(dy) + ", expected " + shape_text(g); });
  OnDeviceOf device(g);
  auto const zeros_like_or_none = [&](OptionalTensor const& x) {
    return x ? torch::stable::new_zeros(*x, x->sizes()) : empty(g, {0}, ScalarType::Float);
  };
  Tensor dg = empty(g, g.sizes());
  Tensor dA_log = zeros_like_or_none(A_log), ddt_bias = zeros_like_or_none(dt_bias);
  if (g.numel() == 0) return {dg, dA_log, ddt_bias};
  Tensor const g4 = four_dimensions(g), dy4 = four_dimensions(dy), dg4 = four_dimensions(dg);
  KdaGateParams p = gate_params(op, g4, A_log, dt_bias, lower_bound);
  p.y = gate_tensor(op, "dy", dy4);
  p.dg = gate_tensor(op, "dg", dg4);
  p.row_blocks = gate_row_blocks(p.rows0 * p.rows1);
  Tensor const partial = empty(g, {2, p.row_blocks, p.value_heads, p.key_dim}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  if (A_log) p.dA_log = static_cast<float*>(dA_log.data_ptr());
  if (dt_bias) p.ddt_bias = static_cast<float*>(ddt_bias.data_ptr());
  select_kda_gate(p.g.dtype).bwd(p, device.stream());
  return {dg, dA_log, ddt_bias};
}

}  // namespace
}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("kda_gate_fwd", TORCH_BOX(&kda::kda_gate_fwd));
  m.impl("kda_gate_bwd", TORCH_BOX(&kda::kda_gate_bwd));
}
