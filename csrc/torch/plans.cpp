// What kda_cuda.explain() asks of the library: how a call would be launched on the current device. Plain C, for ctypes.
#include <cstdio>

#include "kda/chunk_fwd/dispatch.h"
#include "platform/device.h"

namespace kda {
namespace {

/// One line of "name=value" pairs.
int describe(ChunkFwdVariant const& v, ChunkPlan const& plan, int value_heads, int value_dim, char* to, int capacity) {
  return std::snprintf(
      to, size_t(capacity),
      "variant=%s chunk=%d key_tile=%d prepare_grid=%lldx%d prepare_threads=%d prepare_shared_bytes=%zu "
      "scan_grid=%dx%dx%d scan_threads=%d scan_shared_bytes=%zu workspace_bytes=%zu",
      v.name, v.chunk, v.key_tile, (long long)plan.slots(), value_heads, v.prepare_threads, v.prepare_shared_bytes,
      plan.sequences, value_heads, value_tiles(value_dim), v.scan_threads, v.scan_shared_bytes,
      v.workspace_bytes(plan, value_heads, value_dim));
}

}  // namespace
}  // namespace kda

/// `sequences`: entries of cu_seqlens less one, or -1 without cu_seqlens. Returns the length of the text, 0 if no
/// variant serves the call, -1 if the device cannot be asked.
extern "C" __attribute__((visibility("default"))) int kda_plan_chunk_fwd(int dtype, long long batch, long long tokens,
                                                                         int sequences, int value_heads, int key_dim,
                                                                         int value_dim, int chunk_size, char* to,
                                                                         int capacity) try {
  kda::ChunkFwdVariant const* variant =
      kda::select_chunk_fwd(kda::Dtype(dtype), key_dim, chunk_size, {kda::has_wgmma(), kda::shared_memory_limit()});
  if (!variant) return 0;
  kda::ChunkPlan plan{tokens, sequences < 0 ? int32_t(batch) : sequences, nullptr, false, variant->chunk};
  static char const known = 0;  // slots() asks only whether there are boundaries
  if (sequences >= 0) plan.cu_seqlens = &known;
  return kda::describe(*variant, plan, value_heads, value_dim, to, capacity);
} catch (std::exception const&) {
  return -1;
}
