#include "kda/short_conv/launch_variant.h"

namespace kda {
template void plan_short_conv_fwd<float>(ShortConvCall&, int64_t);
template void plan_short_conv_bwd<float>(ShortConvCall&, int64_t);
template void launch_short_conv_fwd<float>(ShortConvFwdParams const&, cudaStream_t);
template void launch_short_conv_bwd<float>(ShortConvBwdParams const&, cudaStream_t);
template std::vector<KernelLaunch> short_conv_kernels<float>();
}  // namespace kda
