#include "kda/gated_rmsnorm/launch_variant.h"

namespace kda {
template void launch_gated_rmsnorm_fwd<float>(GatedRmsNormParams const&, cudaStream_t);
template void launch_gated_rmsnorm_bwd<float>(GatedRmsNormParams const&, cudaStream_t);
template std::vector<KernelLaunch> gated_rmsnorm_kernels<float>();
}  // namespace kda
