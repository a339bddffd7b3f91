#include "kda/gated_rmsnorm/launch_variant.h"

namespace kda {
template void launch_gated_rmsnorm_fwd<Fp16>(GatedRmsNormParams const&, cudaStream_t);
template void launch_gated_rmsnorm_bwd<Fp16>(GatedRmsNormParams const&, cudaStream_t);
template std::vector<KernelLaunch> gated_rmsnorm_kernels<Fp16>();
}  // namespace kda
