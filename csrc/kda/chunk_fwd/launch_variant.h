// The launch of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/chunk_fwd/clear.h"
#include "kda/chunk_fwd/kernel.h"
#include "kda/chunk_fwd/launch.h"
#include "kda/chunk_fwd/variants.h"
#include "platform/launch.h"

namespace kda {

template <class Variant>
void launch_chunk_fwd(ChunkFwdParams const& p, cudaStream_t stream) {
  unsigned const slots = unsigned(p.plan.slots()), heads = unsigned(p.value_heads);
  if (p.clear_unowned)
    launch("chunk_fwd_clear", chunk_fwd_clear_kernel<Variant>, dim3(unsigned(p.plan.sequences + 2), kClearBlocks),
           dim3(kClearThreads), 0, stream, p);
  if (slots)
    launch("chunk_fwd_prepare", chunk_fwd_prepare_kernel<Variant>, dim3(slots, heads), dim3(Prepare<Variant>::kThreads),
           sizeof(PrepareStorage<Variant>), stream, p);
  launch("chunk_fwd_scan", chunk_fwd_scan_kernel<Variant>,
         dim3(unsigned(p.plan.sequences), heads, unsigned(value_tiles(p.value_dim))),
         dim3(ScanShape<Variant>::kThreads), sizeof(ScanStorage<Variant>), stream, p);
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
          ScanShape<Variant>::kThreads,
          &launch_chunk_fwd<Variant>};
}

}  // namespace kda
