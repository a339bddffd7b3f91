#include "kda/short_conv/launch_variant.h"

namespace kda {
template void plan_short_conv_fwd<Bf16>(ShortConvCall&, int64_t);
template void plan_short_conv_bwd<Bf16>(ShortConvCall&, int64_t);
template void launch_short_conv_fwd<Bf16>(ShortConvFwdParams const&, cudaStream_t);
template void launch_short_conv_bwd<Bf16>(ShortConvBwdParams const&, cudaStream_t);
template std::vector<KernelLaunch> short_conv_kernels<Bf16>();
}  // namespace kda
