// What the host knows of one compiled variant of the forward.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "kda/chunk/launch_prepare.h"
#include "kda/chunk/shape.h"
#include "kda/chunk_fwd/params.h"
#include "kda/dtype.h"
#include "platform/launch.h"

namespace kda {

/// The shape of a call.
struct ChunkFwdCall {
  ChunkPlan plan;
  int value_heads, key_dim, value_dim;
  bool batch_invariant;

  explicit ChunkFwdCall(ChunkInputs const& p)
      : plan(p.plan),
        value_heads(p.value_heads),
        key_dim(p.key_dim),
        value_dim(p.value_dim),
        batch_invariant(p.batch_invariant) {}
};

struct ChunkFwdSchedule;  // schedule.h

struct ChunkFwdVariant {
  char const* name;
  Dtype dtype;
  int chunk, key_tile;
  bool wgmma;                             // needs compute capability 9.0
  size_t record_bytes, value_tile_bytes;  // workspace per cell and value head, and per tile of V there
  PrepareVariant prepare;
  size_t scan_shared_bytes;
  int scan_threads;
  std::vector<KernelLaunch> (*kernels)();
  void (*launch)(ChunkFwdParams, ChunkFwdSchedule const&, cudaStream_t);

  /// Of one chunk of one value head in the workspace.
  size_t cell_bytes(int value_dim) const { return record_bytes + value_tiles(value_dim) * value_tile_bytes; }
  size_t shared_bytes() const { return std::max(prepare.shared_bytes, scan_shared_bytes); }
  int element_bytes() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
};

/// Instantiated by the file of each variant.
template <class Variant>
ChunkFwdVariant describe_chunk_fwd();

}  // namespace kda
