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
  int prepare_threads, prepare_blocks_per_sm, scan_threads;
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
  /// How many chunks a block of the prepare kernel walks over, so that the last wave of blocks is nearly full. A
  /// further chunk hides its loads behind the one before; the first cannot.
  int32_t slots_per_block(int64_t part_slots, int value_heads) const {
    int64_t const at_once = int64_t(multiprocessors()) * prepare_blocks_per_sm;
    constexpr double kFirstLoad = 0.3;  // of the time of a chunk
    int32_t best = 1;
    double best_time = 0;
    for (int32_t n = 1; n <= 16; ++n) {
      int64_t const blocks = (part_slots + n - 1) / n * value_heads;
      double const time = double((blocks + at_once - 1) / at_once) * (n + kFirstLoad);
      if (n == 1 || time < best_time) best = n, best_time = time;
    }
    return best;
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
