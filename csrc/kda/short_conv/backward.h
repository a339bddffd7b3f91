// The backward: a warp goes through a run and kPast tokens beyond it, whose gradients reach back into the run.
//
//   dz_t = dy_t activation'(z_t)      dx_s = sum_k weight_k dz_{s + kPast - k}      dweight_k = sum_t dz_t x_{t - kPast
//   + k}
//
// dx of token s is complete once dz of token s + kPast is known. Before the first run of a sequence lies its initial
// state, whose gradient is what dx would be there.
#pragma once
#include "kda/short_conv/kernel.h"

namespace kda {

template <class Shape>
struct ConvGradients {
  float tap[Shape::kTaps][Shape::kChannels] = {}, bias[Shape::kChannels] = {};
};

template <class Shape>
struct ConvBwdStorage {
  ConvWeights<Shape> weights;
  float sum[kConvWarps][Shape::kTaps + 1][Shape::kBlockChannels];  // the last one: of the bias

  KDA_DEVICE void put(ConvGradients<Shape> const& d) {
    int const first = lane_index() * Shape::kChannels;
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c) {
#pragma unroll
      for (int k = 0; k < Shape::kTaps; ++k) sum[warp_index()][k][first + c] = d.tap[k][c];
      sum[warp_index()][Shape::kTaps][first + c] = d.bias[c];
    }
  }
  /// Adds the block's runs in order. All threads of the block.
  KDA_DEVICE void add_up(ShortConvBwdParams const& p, ConvBlock<Shape> const& block) {
    sync_block();
    int const absent = Shape::kTaps - p.taps, first = block.first_channel;
    for (int i = thread_index(); i < Shape::kBlockChannels && first + i < p.channels; i += kConvThreads)
      for (int k = absent; k <= Shape::kTaps; ++k) {
        float total = 0.f;
        for (int warp = 0; warp < kConvWarps; ++warp) total += sum[warp][k][i];
        p.partial[(int64_t(block.run) * (p.taps + 1) + k - absent) * p.channels + first + i] = total;
      }
  }
};

/// One thread on its way through a run.
template <class Shape>
struct ConvBackward {
  using E = typename Shape::Element;
  using Channels = typename Shape::Channels;
  ShortConvBwdParams const& p;
  ConvThread<Shape> const& me;
  int const steps;           // tokens whose dz reach into the run
  int const known;           // of these: beyond the sequence there is nothing
  int const first_in_final;  // the token of the run that is the first one of the final state
  int const inner_end;       // tokens before it are no matter of the final state, nor are those kAhead behind them
  ConvCursor<Shape> x_from, dy_from, to;  // dx, kPast tokens behind
  Channels x_ahead[Shape::kAhead], dy_ahead[Shape::kAhead];
  float window[Shape::kPast][Shape::kChannels], gradients[Shape::kPast][Shape::kChannels] = {};  // of x and of dz
  ConvGradients<Shape> sum;

  /// The first inputs are on their way from here on.
  KDA_DEVICE ConvBackward(ShortConvBwdParams const& params, ConvThread<Shape> const& thread)
      : p(params),
        me(thread),
        steps(me.run.count + Shape::kPast),
        known(at_most(me.run.sequence_end - me.run.begin, steps)),
        first_in_final(at_most(me.run.sequence_end - me.run.begin, 1 << 30) - p.taps + 1),
        inner_end(p.d_final_state.data ? at_most(first_in_final, me.run.count) : me.run.count),
        x_from(me.cursor(p.x, me.run.begin)),
        dy_from(me.cursor(p.dy, me.run.begin)),
        to(me.cursor(p.dx, me.run.begin - Shape::kPast)) {
#pragma unroll
    for (int u = 0; u < Shape::kAhead; ++u) {
      bool const exists = me.present && u < known;
      x_from.fetch_next(x_ahead[u], exists), dy_from.fetch_next(dy_ahead[u], exists);
    }
  }
  static KDA_DEVICE int at_most(int64_t x, int limit) { return x < limit ? int(x) : limit; }

  /// dz from dy. What nobody asks for has no gradient, whatever it holds.
  KDA_DEVICE void through_activation(ConvFilter<Shape> const& filter, float const (&x)[Shape::kChannels],
                                     float (&dz)[Shape::kChannels]) const {
    if (p.activation == Activation::kNone) return;
    float z[Shape::kChannels];
    filter.sums(window, x, z);
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c) dz[c] *= silu<E>(dz[c] == 0.f ? 0.f : z[c]).y;
  }
  KDA_DEVICE void add_weights(float const (&x)[Shape::kChannels], float const (&dz)[Shape::kChannels]) {
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c) {
#pragma unroll
      for (int k = 0; k < Shape::kPast; ++k) sum.tap[k][c] = fmaf(dz[c], window[k][c], sum.tap[k][c]);
      sum.tap[Shape::kPast][c] = fmaf(dz[c], x[c], sum.tap[Shape::kPast][c]);
      sum.bias[c] += dz[c];
    }
  }
  /// What the states have to do with dx of the token `index` of the run, or of one before it where that is below zero.
  KDA_DEVICE void exchange_with_states(int index, float (&dx)[Shape::kChannels]) const {
    if (p.d_final_state.data && index >= first_in_final && index < me.run.count) {
      float passed[Shape::kChannels];
      me.load_state(p.d_final_state, index - first_in_final, passed);
#pragma unroll
      for (int c = 0; c < Shape::kChannels; ++c) dx[c] += passed[c];
    }
    if (me.run.is_first && p.d_initial_state.data && index < 0 && index + p.taps > 0)
      me.store_state(p.d_initial_state, index + p.taps - 1, dx);
  }

  /// kAhead tokens. Inner: they and as many behind them belong to the run, and no state has to do with their dx.
  template <bool kInner>
  KDA_DEVICE void step(ConvFilter<Shape> const& filter, int first) {
#pragma unroll
    for (int u = 0; u < Shape::kAhead; ++u) {
      int const index = first + u;
      float x[Shape::kChannels], dz[Shape::kChannels], dx[Shape::kChannels];
      x_ahead[u].unpack(x), dy_ahead[u].unpack(dz);
      bool const more = kInner || index + Shape::kAhead < known;
      x_from.fetch_next(x_ahead[u], more), dy_from.fetch_next(dy_ahead[u], more);
      through_activation(filter, x, dz);
      if (kInner || index < me.run.count) add_weights(x, dz);
#pragma unroll
      for (int c = 0; c < Shape::kChannels; ++c) dx[c] = 0.f;
#pragma unroll
      for (int k = Shape::kTaps - 1; k >= 0; --k) {
        if (!filter.has(k)) continue;
#pragma unroll
        for (int c = 0; c < Shape::kChannels; ++c)
          dx[c] = fmaf(filter.tap[k][c], k ? gradients[k ? Shape::kTaps - 1 - k : 0][c] : dz[c], dx[c]);
      }
      push<Shape>(window, x), push<Shape>(gradients, dz);
      int const of = index - Shape::kPast;  // dx
      if (!kInner) exchange_with_states(of, dx);
      to.store_next(dx, kInner || (of >= 0 && of < me.run.count));
    }
  }

  KDA_DEVICE void walk(ConvFilter<Shape> const& filter) {
    me.load_window(p, me.run.begin, window);
#pragma unroll 1
    for (int index = 0; index < steps; index += Shape::kAhead) {
      if (index >= Shape::kPast && index + 2 * Shape::kAhead <= inner_end) step<true>(filter, index);
      else step<false>(filter, index);
    }
  }
};

/// Blocks as those of the forward.
template <class Shape>
KDA_GLOBAL void __launch_bounds__(kConvThreads, Shape::kBackwardBlocks)
    short_conv_bwd_kernel(ShortConvBwdParams const p) {
  KDA_SHARED(ConvBwdStorage<Shape>, storage);
  ConvBlock<Shape> const block(p);
  if (block.run >= p.run_blocks) return clear_unowned<Shape>(p, p.dx, block);
  ConvThread<Shape> const me(p, block);
  ConvBackward<Shape> backward(p, me);
  storage.weights.load(p, block.first_channel);
  if (me.present) backward.walk(ConvFilter<Shape>(p, storage.weights));
  storage.put(backward.sum);
  storage.add_up(p, block);
}

/// Adds the blocks in order.
static KDA_GLOBAL void __launch_bounds__(kConvSumThreads) short_conv_reduce_kernel(ShortConvBwdParams const p) {
  using Storage = ColumnSumStorage<kConvSumThreads, kConvSumColumns>;
  KDA_SHARED(Storage, storage);
  wait_for_previous_kernel();
  sum_columns(storage, p.partial, p.run_blocks, int64_t(p.taps + 1) * p.channels, [&](int64_t column, float sum) {
    int const tap = int(column / p.channels), channel = int(column % p.channels);
    if (tap < p.taps) store_float(p.dweight, p.weight_dtype, int64_t(channel) * p.taps + tap, sum);
    else if (p.dbias) store_float(p.dbias, p.weight_dtype, channel, sum);
  });
}

}  // namespace kda
