// The kernel of everything that a chunk needs and that does not depend on the state.
#pragma once
#include "kda/chunk/prepare.h"

namespace kda {

template <class Variant, int kTeams>
KDA_DEVICE void prepare_chunks(ChunkCall const& p) {
  using Team = Prepare<Variant, kTeams>;
  KDA_DYNAMIC_SHARED(PrepareStorage<Variant>, storage);
  int32_t const team = Team::team(), walker = blockIdx.x * kTeams + team, first = walker / p.round_heads;
  if (first < p.walkers) Team::run(p, storage[team], p.first_head + walker % p.round_heads, first);
  // The scan of the round before may still run. So that nothing behind this kernel starts before that one ends:
  if (p.progress && blockIdx.x == 0) wait_for_previous_kernel();
}
template <class Variant>
KDA_GLOBAL void __launch_bounds__(Prepare<Variant, 1>::kBlockThreads, Prepare<Variant, 1>::kBlocksPerSm)
    chunk_prepare_kernel(ChunkCall const p) {
  prepare_chunks<Variant, 1>(p);
}
/// So that it leaves other SMs to the scan.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(PrepareTeams<Variant>::kBlockThreads, PrepareTeams<Variant>::kBlocksPerSm)
    chunk_prepare_teams_kernel(ChunkCall const p) {
  prepare_chunks<Variant, prepare_teams<Variant>()>(p);
}

}  // namespace kda
