// What the host knows of the prepare kernel of a variant, and how it is launched. Compiled once for each variant, with
// the forward; the backward uses it too.
#pragma once
#include <cstddef>
#include <vector>

#include "kda/chunk/inputs.h"
#include "kda/chunk/workspace.h"
#include "kda/dtype.h"
#include "platform/launch.h"

namespace kda {

/// What a chunk of a block of the prepare kernel takes, in microseconds on an H100 (bench/log): fitted to measurements
/// of bf16_k128_sm90, fp16_k128_sm90, fp32_k128, bf16_k64_sm90 and bf16_k256; the others are taken to be like these.
struct PrepareCost {
  double turn, turn_alone;  // with as many blocks per SM as fit, with one

  PrepareCost(Dtype dtype, int key_tile) {
    if (dtype == Dtype::kFloat32) {  // three products; chunks of 32 (K = 64) or 16 tokens
      turn = key_tile == 256 ? 60 : 41;
    } else {  // in fp16 the gates are mostly too steep for one anchor per 16 tokens
      turn = (dtype == Dtype::kFloat16 ? 1.9 : 1) * (key_tile == 64 ? 14 : 15);
    }
    turn_alone = turn * 2 / 3;
  }
};

/// How many walkers the prepare kernel has for each value head, and what it then takes, in microseconds.
struct PrepareWalk {
  int32_t walkers;
  double us;
};

struct PrepareVariant {
  char const* name;
  Dtype dtype;
  int key_tile;
  int threads;          // of a team
  int teams;            // that a multiprocessor of compute capability 9.0 holds
  size_t shared_bytes;  // of a team

  static constexpr double kFirstLoad = 0.3;  // of a turn: a walker's first chunk cannot hide its loads behind another

  PrepareCost cost() const { return {dtype, key_tile}; }

  /// With as many walkers as make the last wave of them nearly full.
  PrepareWalk walk(int64_t round_cells, int value_heads, DeviceTraits const& device) const {
    PrepareWalk best{1, 0};
    for (int32_t turns = 1; turns <= 16; ++turns) {
      int64_t const walkers = std::max<int64_t>(divide_up(round_cells, turns), 1), all = walkers * value_heads,
                    waves = divide_up(all, int64_t(device.multiprocessors) * teams);
      double const us =
          double(waves) * (turns + kFirstLoad) * (all <= device.multiprocessors ? cost().turn_alone : cost().turn);
      if (turns == 1 || us < best.us) best = {int32_t(walkers), us};
    }
    return best;
  }
};

template <class Variant>
PrepareVariant describe_prepare();

/// Everything of one round that no state is needed for. `teams`: of threads, in a block; 1, or as many as fit. `early`:
/// the kernel may start before the one ahead of it has ended.
template <class Variant>
void launch_prepare(ChunkCall const& p, int teams, bool early, cudaStream_t stream);

template <class Variant>
std::vector<KernelLaunch> prepare_kernels();

}  // namespace kda
