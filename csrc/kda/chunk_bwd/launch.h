// What the host knows of one compiled variant of the backward.
#pragma once
#include <algorithm>
#include <vector>

#include "kda/chunk/launch_prepare.h"
#include "kda/chunk_bwd/params.h"

namespace kda {

/// Bytes of workspace for a token of a value head that a call of several heads may take at most, and all of it no more
/// than the device's large_workspace. Rounds of fewer heads take less; one head of one sequence takes what it takes. In
/// 16 bits K = V = 128 takes 2016 in one round, if sequences leave few cells empty.
inline constexpr double kBackwardBytesPerToken = 2048;

/// How a call is launched: explained, and obeyed.
struct ChunkBwdSchedule {
  int rounds;  // of value heads, one after another in the same workspace
  int heads_per_round;
  int32_t walkers, last_walkers;  // of the prepare kernel, for each value head; in the last round
  size_t workspace_bytes;
};

struct ChunkBwdVariant {
  char const* name;
  Dtype dtype;
  int chunk, key_tile;
  bool wgmma;
  size_t kernel_shared_bytes;  // the most that one of its own kernels takes
  PrepareVariant prepare;
  int64_t (*cell_bytes)(int value_dim);
  int64_t front_bytes;  // of the workspace, in front of the first cell
  std::vector<KernelLaunch> (*kernels)();
  void (*launch)(ChunkBwdParams, ChunkBwdSchedule const&, cudaStream_t);

  size_t shared_bytes() const { return std::max(kernel_shared_bytes, prepare.shared_bytes); }
  int element_bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
};

/// In rounds of so many value heads.
inline ChunkBwdSchedule schedule_rounds(ChunkBwdVariant const& variant, ChunkPlan const& plan, int value_heads,
                                        int value_dim, int64_t heads_per_round, DeviceTraits const& device) {
  int64_t const cells = plan.cells(), rounds = divide_up(value_heads, heads_per_round);
  auto const walkers = [&](int64_t heads) { return variant.prepare.walk(cells, int(heads), device).walkers; };
  return {int(rounds), int(heads_per_round), walkers(heads_per_round),
          walkers(value_heads - (rounds - 1) * heads_per_round),
          size_t(variant.front_bytes + heads_per_round * cells * variant.cell_bytes(value_dim)) + kRecordAlignment};
}

inline ChunkBwdSchedule schedule_chunk_bwd(ChunkBwdVariant const& variant, ChunkPlan const& plan, int value_heads,
                                           int value_dim, DeviceTraits const& device) {
  int64_t const per_head = plan.cells() * variant.cell_bytes(value_dim);
  double const tokens = double(plan.cu_seqlens ? plan.tokens : plan.tokens * plan.sequences);
  double const scale = double(variant.key_tile * variant.element_bytes()) / 256.;  // beside K = V = 128 in 16 bits
  double const allowed =
      std::min(std::max(kBackwardBytesPerToken * scale * tokens * value_heads, double(device.small_workspace)),
               double(device.large_workspace));
  int64_t const fit = std::max<int64_t>(1, int64_t(allowed / double(std::max<int64_t>(per_head, 1))));
  int64_t const rounds = divide_up(value_heads, std::min<int64_t>(fit, value_heads));
  return schedule_rounds(variant, plan, value_heads, value_dim, divide_up(value_heads, rounds), device);
}

/// Instantiated by the file of each variant.
template <class Variant>
ChunkBwdVariant describe_chunk_bwd();

}  // namespace kda
