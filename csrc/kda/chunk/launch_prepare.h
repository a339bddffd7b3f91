// How the prepare kernel is launched. Compiled once for each variant, with the forward; the backward uses it too.
#pragma once
#include <vector>

#include "kda/chunk/inputs.h"
#include "platform/launch.h"

namespace kda {

/// Everything of one part that no state is needed for. `teams`: of threads, in a block; 1, or as many as fit. `early`:
/// the kernel may start before the one ahead of it has ended.
template <class Variant>
void launch_prepare(ChunkCall const& p, int teams, bool early, cudaStream_t stream);

template <class Variant>
std::vector<KernelLaunch> prepare_kernels();

}  // namespace kda
