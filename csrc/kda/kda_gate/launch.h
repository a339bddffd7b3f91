// What the host knows of one compiled variant of the gate.
#pragma once
#include <vector>

#include "kda/kda_gate/params.h"
#include "platform/launch.h"

namespace kda {

struct KdaGateVariant {
  Dtype dtype;  // of g
  std::vector<KernelLaunch> (*kernels)();
  void (*fwd)(KdaGateParams const&, cudaStream_t);
  void (*bwd)(KdaGateParams const&, cudaStream_t);
};

/// Instantiated by the file of each variant.
template <class E>
KdaGateVariant describe_kda_gate();

}  // namespace kda
