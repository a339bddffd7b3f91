// What kda_cuda asks of the library before a call: how it would be launched on the current device. Plain C, for ctypes.
#include <cstdio>

#include "kda/chunk_fwd/dispatch.h"
#include "kda/decode/dispatch.h"
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

/// Likewise. `layer`: of decode_layer; else of decode and decode_commit. `state_dtype`: of both pools, whose addresses
/// and slot strides (elements) decide how they are moved; null: absent. Returns the length of the text, 0 if nothing
/// would be launched.
extern "C" __attribute__((visibility("default"))) int kda_plan_decode(int layer, int state_dtype, int value_first,
                                                                      long long tokens, int sequences, int value_heads,
                                                                      int key_dim, int value_dim, void* state,
                                                                      long long slot_stride, void* new_state,
                                                                      long long new_slot_stride, char* to,
                                                                      int capacity) {
  kda::DecodeParams p{};
  p.state_dtype = kda::Dtype(state_dtype), p.value_first = value_first;
  p.tokens = tokens, p.sequences = sequences, p.heads = p.value_heads = value_heads;
  p.key_dim = key_dim, p.value_dim = value_dim;
  p.state = {state, 0, slot_stride, {}}, p.new_state = {new_state, 0, new_slot_stride, {}};
  int length = 0;
  kda::with_decode_variant(p, [&](auto launcher, bool pieces) {
    kda::DecodePlan const plan = layer ? launcher.layer_plan(p, pieces) : launcher.plan(p, pieces);
    length =
        std::snprintf(to, size_t(capacity),
                      "variant=%s_k%d\nstates=%s, %s\ngrid=%lld\nthreads=%d\nshared_bytes=%zu\nvalues_per_block=%d",
                      state_dtype == int(kda::Dtype::kFloat32) ? "fp32" : "bf16", kda::decode_key_tile(key_dim),
                      value_first ? "[V, K]" : "[K, V]", pieces ? "16 bytes at a time" : "element by element",
                      (long long)plan.blocks, plan.threads, plan.shared_bytes, plan.value_tile);
  });
  return length;
}
