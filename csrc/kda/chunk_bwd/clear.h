// Gradients of tokens that no sequence has: zero.
#pragma once
#include "kda/chunk/unowned.h"
#include "kda/chunk_bwd/params.h"

namespace kda {

/// `count` values of T at each token of the range, from one thread of kClearBlocks blocks.
template <class T>
KDA_DEVICE void clear_tokens(void* data, Sequence const& range, int64_t count) {
  T* const first = static_cast<T*>(data) + range.begin * count;
  for (int64_t i = blockIdx.y * kClearThreads + thread_index(); i < range.length * count;
       i += kClearBlocks * kClearThreads)
    first[i] = from_float<T>(0.f);
}

/// Block x: what follows the last sequence; what precedes the first.
template <class Variant>
KDA_GLOBAL void __launch_bounds__(kClearThreads) chunk_bwd_clear_kernel(ChunkBwdParams const p) {
  using E = typename Variant::Element;
  Sequence const range = unowned(p.plan, p.plan.sequences + int32_t(blockIdx.x));
  if (range.length == 0) return;
  auto const clear = [&](Rows const& x, int64_t count) {
    if (!x.data) return;
    if (x.is_fp32) clear_tokens<float>(x.data, range, count);
    else clear_tokens<E>(x.data, range, count);
  };
  clear(p.dq, p.dq.strides.token), clear(p.dk, p.dk.strides.token), clear(p.dv, p.dv.strides.token);
  clear(p.dg, p.dg.strides.token), clear(p.dbeta, p.dbeta.strides.token);
}

}  // namespace kda
