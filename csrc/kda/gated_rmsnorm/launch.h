// What the host knows of one compiled variant of the gated norm.
#pragma once
#include <vector>

#include "kda/gated_rmsnorm/params.h"
#include "platform/launch.h"

namespace kda {

struct GatedRmsNormVariant {
  Dtype dtype;  // of x
  std::vector<KernelLaunch> (*kernels)();
  void (*fwd)(GatedRmsNormParams const&, cudaStream_t);
  void (*bwd)(GatedRmsNormParams const&, cudaStream_t);
};

/// Instantiated by the file of each variant.
template <class E>
GatedRmsNormVariant describe_gated_rmsnorm();

}  // namespace kda
