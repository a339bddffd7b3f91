// Which variant of the gated norm serves a call. Only for files compiled apart from the kernels.
#pragma once
#include "kda/select.h"
#include "kda/gated_rmsnorm/launch.h"

namespace kda {

inline std::vector<GatedRmsNormVariant> const& gated_rmsnorm_variants() {
  static std::vector<GatedRmsNormVariant> const table = {
      describe_gated_rmsnorm<float>(), describe_gated_rmsnorm<Fp16>(), describe_gated_rmsnorm<Bf16>()};
  return table;
}
inline GatedRmsNormVariant const& select_gated_rmsnorm(Dtype dtype) {
  return variant_of(gated_rmsnorm_variants(), dtype);
}

}  // namespace kda
