// The launch of the prepare kernel of one variant.
#pragma once
#include "kda/chunk/launch_prepare.h"
#include "kda/chunk/prepare_kernel.h"

namespace kda {

template <class Variant>
struct PrepareKernels {
  using K = Kernel<ChunkCall>;
  static K one_team() {
    return {{"chunk_prepare", &typeid(Variant), Prepare<Variant, 1>::kBlockThreads, sizeof(PrepareStorage<Variant>)},
            chunk_prepare_kernel<Variant>};
  }
  /// All teams that fit, in a block.
  static K teams() {
    constexpr int kTeams = kda::prepare_teams<Variant>();  // nvcc's host code does not find PrepareTeams in here
    return {{"chunk_prepare_teams", &typeid(Variant), Prepare<Variant, 1>::kThreads * kTeams,
             sizeof(PrepareStorage<Variant>) * kTeams},
            chunk_prepare_teams_kernel<Variant>};
  }
};

template <class Variant>
PrepareVariant describe_prepare() {
  KernelLaunch const kernel = PrepareKernels<Variant>::one_team();
  return {Variant::name,  dtype_of<typename Variant::Element>(), Variant::config.key_tile,
          kernel.threads, kda::prepare_teams<Variant>(),         kernel.shared_bytes};
}

template <class Variant>
void launch_prepare(ChunkCall const& p, int teams, bool early, cudaStream_t stream) {
  dim3 const grid(unsigned((int64_t(p.walkers) * p.round_heads + teams - 1) / teams));
  if constexpr (Variant::config.wgmma)
    if (teams > 1) return launch_early(early, PrepareKernels<Variant>::teams(), grid, stream, p);
  launch_early(early, PrepareKernels<Variant>::one_team(), grid, stream, p);
}

template <class Variant>
std::vector<KernelLaunch> prepare_kernels() {
  std::vector<KernelLaunch> kernels{PrepareKernels<Variant>::one_team()};
  if constexpr (Variant::config.wgmma) kernels.push_back(PrepareKernels<Variant>::teams());
  return kernels;
}

}  // namespace kda
