// What the host knows of one compiled variant of the backward.
#pragma once
#include <algorithm>

#include "kda/chunk_bwd/params.h"
#include "kda/chunk_fwd/launch.h"

namespace kda {

/// Bytes of workspace for a token of a value head that a call of several heads may take at most. Rounds of fewer heads
/// take less; one head of one sequence takes what it takes.
inline constexpr double kBackwardBytesPerToken = 2048;

/// How a call is launched: explained, and obeyed.
struct ChunkBwdSchedule {
  int rounds;  // of value heads, one after another in the same workspace
  int heads_per_round;
  size_t workspace_bytes;
};

struct ChunkBwdVariant {
  char const* name;
  Dtype dtype;
  int chunk, key_tile;
  bool wgmma;
  size_t shared_bytes;  // the most that one of its kernels takes
  int64_t (*cell_bytes)(int value_dim);
  std::vector<KernelLaunch> (*kernels)();
  void (*launch)(ChunkBwdParams, ChunkBwdSchedule const&, ChunkFwdVariant const&, cudaStream_t);

  ChunkBwdSchedule schedule(ChunkPlan const& plan, int value_heads, int value_dim) const {
    int64_t const per_head = plan.slots() * cell_bytes(value_dim);
    double const tokens = double(plan.cu_seqlens ? plan.tokens : plan.tokens * plan.sequences);
    double const scale = double(key_tile * element_bytes()) / 256.;  // beside K = V = 128 in 16 bits
    double const allowed = std::max(kBackwardBytesPerToken * scale * tokens * value_heads, double(small_workspace()));
    int64_t const fit = std::max<int64_t>(1, int64_t(allowed / double(std::max<int64_t>(per_head, 1))));
    int64_t const rounds = divide_up(value_heads, std::min<int64_t>(fit, value_heads));
    int64_t const in_round = divide_up(value_heads, rounds);
    return {int(divide_up(value_heads, in_round)), int(in_round), size_t(in_round * per_head) + kRecordAlignment};
  }
  int element_bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
};

/// Instantiated by the file of each variant.
template <class Variant>
ChunkBwdVariant describe_chunk_bwd();

}  // namespace kda
