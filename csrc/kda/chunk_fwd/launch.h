// What the host knows of one compiled variant.
#pragma once
#include <cstddef>
#include <cstdlib>

#include "kda/chunk_fwd/config.h"
#include "kda/chunk_fwd/params.h"
#include "kda/dtype.h"

namespace kda {

inline constexpr double kWorkspaceShare = 1.5;        // of the bytes of q and k
inline constexpr int64_t kSmallWorkspace = 16 << 20;  // that is always allowed
inline constexpr int64_t kPartBlocks = 256;           // of the prepare kernel, at least
inline int64_t part_bytes() {
  char const* mb = std::getenv("KDA_PART_MB");
  return int64_t(mb ? atoi(mb) : 32) << 20;
}

struct ChunkFwdVariant {
  char const* name;
  Dtype dtype;
  int chunk, key_tile;
  bool wgmma;                             // needs compute capability 9.0
  size_t record_bytes, value_tile_bytes;  // workspace per slot and value head, and per tile of V there
  size_t prepare_shared_bytes, scan_shared_bytes;
  int prepare_threads, scan_threads;
  void (*launch)(ChunkFwdParams, cudaStream_t);

  size_t shared_bytes() const {
    return prepare_shared_bytes > scan_shared_bytes ? prepare_shared_bytes : scan_shared_bytes;
  }
  /// The work goes in parts, so that the workspace is never large beside the inputs (kWorkspaceShare) and one part
  /// stays in the L2 between the kernels that write and read it, but not so small that a part would leave the device
  /// idle.
  int64_t part_slots(ChunkPlan const& plan, int value_heads, int key_dim, int value_dim) const {
    int64_t const slot_bytes = value_heads * int64_t(record_bytes + value_tiles(value_dim) * value_tile_bytes);
    int64_t const rows = plan.cu_seqlens ? 1 : plan.sequences, element = dtype == Dtype::kFloat32 ? 4 : 2;
    int64_t const inputs = 2 * rows * plan.tokens * value_heads * key_dim * element;  // q and k, for all value heads
    int64_t slots = int64_t(kWorkspaceShare * double(inputs)) / slot_bytes;
    int64_t const small = kSmallWorkspace / slot_bytes;
    int64_t const in_l2 = part_bytes() / slot_bytes, busy = (kPartBlocks + value_heads - 1) / value_heads;
    slots = slots > small ? slots : small;
    slots = slots < in_l2 || slots < busy ? slots : in_l2 > busy ? in_l2 : busy;
    return slots < 1 ? 1 : slots < plan.slots() ? slots : plan.slots();
  }
  /// Records of one part, then two states per value head, where there is more than one part.
  size_t workspace_bytes(ChunkPlan const& plan, int value_heads, int key_dim, int value_dim) const {
    int64_t const slots = part_slots(plan, value_heads, key_dim, value_dim);
    return records_bytes(slots, value_heads, value_dim) +
           (slots < plan.slots() ? 2 * carry_floats(value_heads, value_dim) * sizeof(float) : 0);
  }
  size_t records_bytes(int64_t slots, int value_heads, int value_dim) const {
    return size_t(slots) * value_heads * (record_bytes + value_tiles(value_dim) * value_tile_bytes);
  }
  size_t carry_floats(int value_heads, int value_dim) const {
    return size_t(value_heads) * value_tiles(value_dim) * kValueTile * key_tile;
  }
};

/// Instantiated by the file of each variant.
template <class Variant>
ChunkFwdVariant describe_chunk_fwd();

}  // namespace kda
