// What kda_cuda asks of the library before a call: how it would be launched on the current device. And what the table
// of resources asks: how each variant is launched on any. Plain C, for ctypes.
#include <cstdio>
#include <string>

#include "kda/chunk_fwd/dispatch.h"
#include "platform/device.h"

namespace kda {
namespace {

/// Lines of "name=value".
int describe(ChunkFwdVariant const& v, ChunkPlan const& plan, int value_heads, int key_dim, int value_dim,
             bool batch_invariant, char* to, int capacity) {
  int64_t const part_slots = v.part_slots(plan, value_heads, key_dim, value_dim), slots = plan.slots();
  return std::snprintf(
      to, size_t(capacity),
      "variant=%s\nchunk=%d\nkey_tile=%d\nparts=%lld\nprepare_grid=%lldx%d\nprepare_threads=%d\nprepare_shared_bytes=%"
      "zu\n"
      "scan_grid=%dx%dx%d\nscan_threads=%d\nscan_shared_bytes=%zu\nworkspace_bytes=%zu\n"
      "split=V into %d of %d columns; no sequence, each is scanned by one block per head and part of V\n"
      "batch_invariant=%s",
      v.name, v.chunk, v.key_tile, (long long)(part_slots ? (slots + part_slots - 1) / part_slots : 1),
      (long long)part_slots, value_heads, v.prepare_threads, v.prepare_shared_bytes, plan.sequences, value_heads,
      value_tiles(value_dim), v.scan_threads, v.scan_shared_bytes,
      v.workspace_bytes(plan, value_heads, key_dim, value_dim), value_tiles(value_dim), kValueTile,
      batch_invariant ? "yes, as asked" : "yes, as no sequence is split");
}

}  // namespace
}  // namespace kda

/// `sequences`: entries of cu_seqlens less one, or -1 without cu_seqlens. `state_tokens`: the distance of kept states.
/// Returns the length of the text, 0 if no variant serves the call, -1 if the device cannot be asked.
extern "C" __attribute__((visibility("default"))) int kda_plan_chunk_fwd(int dtype, long long batch, long long tokens,
                                                                         int sequences, int value_heads, int key_dim,
                                                                         int value_dim, int state_tokens,
                                                                         int batch_invariant, char* to,
                                                                         int capacity) try {
  kda::ChunkFwdVariant const* variant =
      kda::select_chunk_fwd(kda::Dtype(dtype), key_dim, state_tokens, {kda::has_wgmma(), kda::shared_memory_limit()});
  if (!variant) return 0;
  kda::ChunkPlan plan{tokens, sequences < 0 ? int32_t(batch) : sequences, nullptr, false, variant->chunk, {}};
  static char const known = 0;  // slots() asks only whether there are boundaries
  if (sequences >= 0) plan.cu_seqlens = &known;
  return kda::describe(*variant, plan, value_heads, key_dim, value_dim, batch_invariant, to, capacity);
} catch (std::exception const&) {
  return -1;
}

/// A line per kernel and variant: kernel, variant, threads, bytes of dynamic shared memory. Asks no device. Returns the
/// length of the text, more than `capacity` if that is too little.
extern "C" __attribute__((visibility("default"))) int kda_chunk_fwd_launches(char* to, int capacity) {
  std::string text;
  for (kda::ChunkFwdVariant const& v : kda::chunk_fwd_variants()) {
    auto const line = [&](char const* kernel, int threads, size_t shared_bytes) {
      text += std::string(kernel) + " " + v.name + " " + std::to_string(threads) + " " + std::to_string(shared_bytes) +
              "\n";
    };
    line("chunk_fwd_prepare_kernel", v.prepare_threads, v.prepare_shared_bytes);
    line("chunk_fwd_scan_kernel", v.scan_threads, v.scan_shared_bytes);
  }
  return std::snprintf(to, size_t(capacity), "%s", text.c_str());
}
