// torch.ops.kda_cuda.gated_rmsnorm_fwd and gated_rmsnorm_bwd.
#include "kda/gated_rmsnorm/dispatch.h"

#include <climits>
#include <vector>

#include "torch/elements.h"

namespace kda {
namespace {

/// x as [outer, heads, dim] with contiguous rows: a view wherever its layout allows one.
Tensor three_dimensions(Tensor const& x) {
  int64_t const d = x.dim(), dim = x.size(d - 1), heads = d > 1 ? x.size(d - 2) : 1;
  Tensor const rows = dim > 1 && x.stride(d - 1) != 1 ? torch::stable::contiguous(x) : x;
  return torch::stable::reshape(rows, {-1, heads, dim});
}

/// Whether heads follow each other as the rows do, so that a row needs no division.
bool is_one_run(Tensor const& x) { return x.size(0) <= 1 || x.stride(0) == x.size(1) * x.stride(1); }

bool moves_in_pieces(Tensor const& x) {
  int64_t const count = 16 / bytes_of(x);
  bool const strides = x.stride(0) % count == 0 && x.stride(1) % count == 0;
  return strides && x.size(2) % count == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

NormRows norm_rows(Tensor const& x, bool one_run) {
  return {x.data_ptr(), one_run ? x.stride(1) : x.stride(0), x.stride(1)};
}

void check(char const* op, Tensor const& x, Tensor const& gate, Tensor const& weight) {
  require(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, "x has shape " + shape_text(x) + ", expected [..., D]");
  require_device_of(op, "x", x, {{"gate", &gate}, {"weight", &weight}});
  require_like(op, "gate", gate, "x", x);
  dtype_of_tensor(op, "weight", weight);
  require_shape(op, "weight", weight, {x.size(x.dim() - 1)});
}

/// `rows`: x, gate, y or dy, and in the backward dx and dgate, all of them [outer, heads, dim].
GatedRmsNormParams norm_params(char const* op, std::vector<Tensor> const& rows, Tensor const& weight, double eps,
                               bool silu) {
  Tensor const& x = rows[0];
  bool one_run = true, in_pieces = true;
  for (Tensor const& t : rows) one_run = one_run && is_one_run(t), in_pieces = in_pieces && moves_in_pieces(t);
  GatedRmsNormParams p{};
  NormRows* const to[] = {&p.x, &p.gate, &p.y, &p.dx, &p.dgate};
  for (size_t i = 0; i < rows.size(); ++i) *to[i] = norm_rows(rows[i], one_run);
  int64_t const count = x.size(0) * x.size(1);
  require(count <= INT_MAX, op, "x has " + std::to_string(count) + " rows, expected fewer than 2^31");
  p.in_pieces = in_pieces;
  p.weight = weight.data_ptr(), p.weight_dtype = dtype_of_tensor(op, "weight", weight);
  p.outer = one_run ? count : x.size(0), p.heads = one_run ? 1 : int32_t(x.size(1)), p.dim = int32_t(x.size(2));
  p.eps = float(eps), p.per_dim = 1.f / float(p.dim);
  p.activation = silu ? Activation::kSilu : Activation::kSigmoid;
  return p;
}

Tensor gated_rmsnorm_fwd(Tensor x, Tensor gate, Tensor weight, double eps, bool silu) {
  char const* op = "gated_rmsnorm_fwd";
  check(op, x, gate, weight);
  OnDeviceOf device(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  weight = torch::stable::contiguous(weight);
  Dtype const dtype = dtype_of_tensor(op, "x", x);
  std::vector<Tensor> const rows = {three_dimensions(x), three_dimensions(gate), three_dimensions(y)};
  GatedRmsNormParams const p = norm_params(op, rows, weight, eps, silu);
  select_gated_rmsnorm(dtype).fwd(p, device.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_rmsnorm_bwd(Tensor dy, Tensor x, Tensor gate, Tensor weight, double eps,
                                                     bool silu) {
  char const* op = "gated_rmsnorm_bwd";
  check(op, x, gate, weight);
  require_device_of(op, "x", x, {{"dy", &dy}});
  require_like(op, "dy", dy, "x", x);
  OnDeviceOf device(x);
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dgate = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return {dx, dgate, torch::stable::new_zeros(weight, weight.sizes())};
  weight = torch::stable::contiguous(weight);
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  Dtype const dtype = dtype_of_tensor(op, "x", x);
  std::vector<Tensor> const rows = {three_dimensions(x), three_dimensions(gate), three_dimensions(dy),
                                    three_dimensions(dx), three_dimensions(dgate)};
  GatedRmsNormParams p = norm_params(op, rows, weight, eps, silu);
  p.runs = gated_rmsnorm_runs(p.outer * p.heads);
  Tensor const partial = torch::stable::new_empty(x, {p.runs, p.dim}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  p.dweight = dweight.data_ptr();
  select_gated_rmsnorm(dtype).bwd(p, device.stream());
  return {dx, dgate, dweight};
}

}  // namespace
}  // namespace kda

KDA_TORCH_IMPL(m) {
  m.impl("gated_rmsnorm_fwd", TORCH_BOX(&kda::gated_rmsnorm_fwd));
  m.impl("gated_rmsnorm_bwd", TORCH_BOX(&kda::gated_rmsnorm_bwd));
}
