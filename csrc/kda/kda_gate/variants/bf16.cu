#include "kda/kda_gate/launch_variant.h"

namespace kda {
template void launch_kda_gate_fwd<Bf16>(KdaGateParams const&, cudaStream_t);
template void launch_kda_gate_bwd<Bf16>(KdaGateParams const&, cudaStream_t);
template std::vector<KernelLaunch> kda_gate_kernels<Bf16>();
}  // namespace kda
