// Which variant of the gate serves a call. Only for files compiled apart from the kernels.
#pragma once
#include "kda/kda_gate/launch.h"
#include "kda/select.h"

namespace kda {

inline std::vector<KdaGateVariant> const& kda_gate_variants() {
  static std::vector<KdaGateVariant> const table = {describe_kda_gate<float>(), describe_kda_gate<Fp16>(),
                                                    describe_kda_gate<Bf16>()};
  return table;
}
inline KdaGateVariant const& select_kda_gate(Dtype dtype) { return variant_of(kda_gate_variants(), dtype); }

}  // namespace kda
