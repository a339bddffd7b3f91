// What the host knows of one compiled variant of the convolution.
#pragma once
#include <vector>

#include "kda/short_conv/params.h"
#include "platform/launch.h"

namespace kda {

struct ShortConvVariant {
  Dtype dtype;  // of x
  std::vector<KernelLaunch> (*kernels)();
  /// Set the runs of the plan, and how many blocks have them; `batch_tokens`: of all batch rows.
  void (*plan_fwd)(ShortConvCall&, int64_t batch_tokens);
  void (*plan_bwd)(ShortConvCall&, int64_t batch_tokens);
  void (*fwd)(ShortConvFwdParams const&, cudaStream_t);
  void (*bwd)(ShortConvBwdParams const&, cudaStream_t);
};

/// Instantiated by the file of each variant.
template <class E>
ShortConvVariant describe_short_conv();

}  // namespace kda
