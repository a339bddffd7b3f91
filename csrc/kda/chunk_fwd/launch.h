// What the host knows of one compiled variant.
#pragma once
#include <cstddef>

#include "kda/chunk_fwd/config.h"
#include "kda/chunk_fwd/params.h"
#include "kda/dtype.h"

namespace kda {

struct ChunkFwdVariant {
  char const* name;
  Dtype dtype;
  int chunk, key_tile;
  bool wgmma;                             // needs compute capability 9.0
  size_t record_bytes, value_tile_bytes;  // workspace per slot and value head, and per tile of V there
  size_t prepare_shared_bytes, scan_shared_bytes;
  int prepare_threads, scan_threads;
  void (*launch)(ChunkFwdParams const&, cudaStream_t);

  size_t shared_bytes() const {
    return prepare_shared_bytes > scan_shared_bytes ? prepare_shared_bytes : scan_shared_bytes;
  }
  size_t workspace_bytes(ChunkPlan const& plan, int value_heads, int value_dim) const {
    return size_t(plan.slots()) * value_heads * (record_bytes + value_tiles(value_dim) * value_tile_bytes);
  }
};

/// Instantiated by the file of each variant.
template <class Variant>
ChunkFwdVariant describe_chunk_fwd();

}  // namespace kda
