// A warp goes through a run of tokens; the inputs that the next token needs stay in registers.
#pragma once
#include "kda/column_sums.h"
#include "kda/short_conv/run.h"

namespace kda {

/// One thread on its way through a run.
template <class Shape>
struct ConvForward {
  using Channels = typename Shape::Channels;
  ShortConvFwdParams const& p;
  ConvThread<Shape> const& me;
  ConvCursor<Shape> from, to;
  Channels ahead[Shape::kAhead];
  float window[Shape::kPast][Shape::kChannels];

  /// The first inputs are on their way from here on.
  KDA_DEVICE ConvForward(ShortConvFwdParams const& params, ConvThread<Shape> const& thread)
      : p(params), me(thread), from(me.cursor(p.x, me.run.begin)), to(me.cursor(p.y, me.run.begin)) {
#pragma unroll
    for (int u = 0; u < Shape::kAhead; ++u) from.fetch_next(ahead[u], me.present && u < me.run.count);
  }

  /// kAhead tokens. Inner: they and as many behind them belong to the run.
  template <bool kInner>
  KDA_DEVICE void step(ConvFilter<Shape> const& filter, int token) {
#pragma unroll
    for (int u = 0; u < Shape::kAhead; ++u) {
      float x[Shape::kChannels], z[Shape::kChannels];
      ahead[u].unpack(x);
      from.fetch_next(ahead[u], kInner || token + u + Shape::kAhead < me.run.count);
      filter.sums(window, x, z);
      push<Shape>(window, x);
      if (p.activation != Activation::kNone) {
#pragma unroll
        for (int c = 0; c < Shape::kChannels; ++c) z[c] = silu<typename Shape::Element>(z[c]).x;
      }
      to.store_next(z, kInner || token + u < me.run.count);
    }
  }

  KDA_DEVICE void walk(ConvFilter<Shape> const& filter) {
    me.load_window(p, me.run.begin, window);
#pragma unroll 1
    for (int token = 0; token < me.run.count; token += Shape::kAhead) {
      if (token + 2 * Shape::kAhead <= me.run.count) step<true>(filter, token);
      else step<false>(filter, token);
    }
    if (!me.run.is_last || !p.final_state.data) return;
    me.load_window(p, me.run.end, window);
#pragma unroll
    for (int k = 0; k < Shape::kPast; ++k)
      if (filter.has(k)) me.store_state(p.final_state, k - filter.absent, window[k]);
  }
};

/// Blocks: run_blocks times channel_blocks; behind them kConvClearBlocks times as many where there are cu_seqlens.
template <class Shape>
KDA_GLOBAL void __launch_bounds__(kConvThreads, Shape::kForwardBlocks)
    short_conv_fwd_kernel(ShortConvFwdParams const p) {
  KDA_SHARED(ConvWeights<Shape>, weights);
  ConvBlock<Shape> const block(p);
  if (block.run >= p.run_blocks) return clear_unowned<Shape>(p, p.y, block);
  ConvThread<Shape> const me(p, block);
  ConvForward<Shape> forward(p, me);
  weights.load(p, block.first_channel);
  if (me.present) forward.walk(ConvFilter<Shape>(p, weights));
}

}  // namespace kda
