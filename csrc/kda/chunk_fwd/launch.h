// What the host knows of one compiled variant.
#pragma once
#include <cstddef>

#include "kda/chunk_fwd/config.h"
#include "kda/chunk_fwd/params.h"
#include "kda/dtype.h"
#include "platform/device.h"

namespace kda {

inline constexpr double kWorkspaceShare = 1.5;  // of the bytes of q and k
inline constexpr size_t kRecordAlignment = 1024;

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
  /// The work goes in parts where the workspace would be large beside the inputs (kWorkspaceShare).
  int64_t part_slots(ChunkPlan const& plan, int value_heads, int key_dim, int value_dim) const {
    int64_t const rows = plan.cu_seqlens ? 1 : plan.sequences, element = dtype == Dtype::kFloat32 ? 4 : 2;
    int64_t const inputs = 2 * rows * plan.tokens * value_heads * key_dim * element;  // q and k, for all value heads
    int64_t const shared = int64_t(kWorkspaceShare * double(inputs));
    int64_t const allowed = shared > small_workspace() ? shared : small_workspace();
    int64_t const most = allowed / int64_t(records_bytes(1, value_heads, value_dim)), slots = plan.slots();
    if (most >= slots) return slots;
    int64_t const parts = most < 1 ? slots : (slots + most - 1) / most;
    return (slots + parts - 1) / parts;
  }
  /// Room to align, records of one part, then two states per value head where there is more than one part.
  size_t workspace_bytes(ChunkPlan const& plan, int value_heads, int key_dim, int value_dim) const {
    int64_t const slots = part_slots(plan, value_heads, key_dim, value_dim);
    return kRecordAlignment + records_bytes(slots, value_heads, value_dim) +
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
