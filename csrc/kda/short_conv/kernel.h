// A warp goes through a run of tokens; the inputs that the next token needs stay in registers.
#pragma once
#include "kda/column_sums.h"
#include "kda/short_conv/run.h"

namespace kda {

/// Blocks: (kConvWarps runs, the channels of a warp); behind them kConvClearBlocks where there are cu_seqlens.
template <class Shape>
KDA_GLOBAL void __launch_bounds__(kConvThreads, Shape::kForwardBlocks)
    short_conv_fwd_kernel(ShortConvFwdParams const p) {
  using Channels = typename Shape::Channels;
  KDA_SHARED(ConvWeights<Shape>, weights);
  if (int(blockIdx.x) >= p.run_blocks) return clear_unowned<Shape>(p, p.y);
  weights.load(p);
  ConvThread<Shape> const me(p);
  if (!me.present) return;
  ConvFilter<Shape> const filter(p, weights);
  float window[Shape::kPast][Shape::kChannels];
  me.load_window(p, me.run.begin, window);
  ConvStream<Shape> from = me.stream(p.x, me.run.begin), to = me.stream(p.y, me.run.begin);
  Channels ahead[Shape::kAhead];
#pragma unroll
  for (int u = 0; u < Shape::kAhead; ++u) from.fetch_next(ahead[u], u < me.run.count);
#pragma unroll 1
  for (int token = 0; token < me.run.count; token += Shape::kAhead) {
#pragma unroll
    for (int u = 0; u < Shape::kAhead; ++u) {
      float x[Shape::kChannels], z[Shape::kChannels];
      ahead[u].unpack(x);
      from.fetch_next(ahead[u], token + u + Shape::kAhead < me.run.count);
      filter.sums(window, x, z);
      push<Shape>(window, x);
      if (p.activation != Activation::kNone) {
#pragma unroll
        for (int c = 0; c < Shape::kChannels; ++c)
          z[c] = activation<typename Shape::Element>(Activation::kSilu, z[c]).x;
      }
      to.store_next(z, token + u < me.run.count);
    }
  }
  if (!me.run.is_last || !p.final_state.data) return;
  me.load_window(p, me.run.end, window);
#pragma unroll
  for (int k = 0; k < Shape::kPast; ++k)
    if (filter.has(k)) me.store_state(p.final_state, k - filter.absent, window[k]);
}

}  // namespace kda
