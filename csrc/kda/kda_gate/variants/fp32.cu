#include "kda/kda_gate/launch_variant.h"

namespace kda {
template void launch_kda_gate_fwd<float>(KdaGateParams const&, cudaStream_t);
template void launch_kda_gate_bwd<float>(KdaGateParams const&, cudaStream_t);
template std::vector<KernelLaunch> kda_gate_kernels<float>();
}  // namespace kda
