// The launch of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/chunk_fwd/clear.h"
#include "kda/chunk_fwd/kernel.h"
#include "kda/chunk_fwd/launch.h"
#include "kda/chunk_fwd/variants.h"
#include "platform/launch.h"

namespace kda {

/// The sequences that have slots in a part: each has its first slot for itself, and one may come from the part before.
inline int64_t sequences_of_part(ChunkPlan const& plan, int64_t part_slots) {
  return part_slots + 1 < plan.sequences ? part_slots + 1 : plan.sequences;
}

template <class Variant>
void launch_chunk_fwd(ChunkFwdParams p, cudaStream_t stream) {
  ChunkFwdVariant const variant = describe_chunk_fwd<Variant>();
  unsigned const heads = unsigned(p.value_heads), tiles = unsigned(value_tiles(p.value_dim));
  if (p.clear_unowned)
    launch("chunk_fwd_clear", chunk_fwd_clear_kernel<Variant>, dim3(unsigned(p.plan.sequences + 2), kClearBlocks),
           dim3(kClearThreads), 0, stream, p);
  int64_t const slots = p.plan.slots(), part_slots = variant.part_slots(p.plan, p.value_heads, p.key_dim, p.value_dim);
  static_assert(alignof(ChunkRecord<Variant>) == kRecordAlignment);
  p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p.workspace) + kRecordAlignment - 1) /
                                        kRecordAlignment * kRecordAlignment);
  p.carry = reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                     variant.records_bytes(part_slots, p.value_heads, p.value_dim));
  p.first_slot = 0, p.part = 0;
  do {  // also where there is no slot at all: the scan writes final states
    p.part_slots = int32_t(slots - p.first_slot < part_slots ? slots - p.first_slot : part_slots);
    p.slots_per_block = variant.slots_per_block(p.part_slots, p.value_heads);
    if (p.part_slots)
      launch("chunk_fwd_prepare", chunk_fwd_prepare_kernel<Variant>,
             dim3(unsigned((p.part_slots + p.slots_per_block - 1) / p.slots_per_block), heads),
             dim3(Prepare<Variant>::kThreads), sizeof(PrepareStorage<Variant>), stream, p);
    int64_t const sequences = slots ? sequences_of_part(p.plan, p.part_slots) : p.plan.sequences;
    launch("chunk_fwd_scan", chunk_fwd_scan_kernel<Variant>, dim3(unsigned(sequences), heads, tiles),
           dim3(ScanShape<Variant>::kThreads), sizeof(ScanStorage<Variant>), stream, p);
    p.first_slot += part_slots, ++p.part;
  } while (p.first_slot < slots);
}

template <class Variant>
ChunkFwdVariant describe_chunk_fwd() {
  return {Variant::name,
          dtype_of<typename Variant::Element>(),
          Variant::config.chunk,
          Variant::config.key_tile,
          Variant::config.wgmma,
          sizeof(ChunkRecord<Variant>),
          sizeof(typename ChunkRecord<Variant>::Values),
          sizeof(PrepareStorage<Variant>),
          sizeof(ScanStorage<Variant>),
          Prepare<Variant>::kThreads,
          Prepare<Variant>::kBlocksPerSm,
          ScanShape<Variant>::kThreads,
          &launch_chunk_fwd<Variant>};
}

}  // namespace kda
