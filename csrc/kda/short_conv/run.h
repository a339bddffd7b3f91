// What a thread of the convolution has: a few channels of a run of tokens, their weights, and a window of inputs.
#pragma once
#include "kda/chunk/unowned.h"
#include "kda/elements.h"
#include "kda/short_conv/params.h"
#include "platform/platform.h"

namespace kda {

/// kFewestTaps to kMostTaps taps; of fewer than the most, the first ones are absent.
template <class ElementType, int kFewestTaps, int kMostTaps, int kChannelsOfThread, int kTokensAhead>
struct ConvShape {
  using Element = ElementType;
  using Channels = Piece<Element, kChannelsOfThread>;
  static constexpr int kTaps = kMostTaps, kMaybeAbsent = kMostTaps - kFewestTaps;
  static constexpr int kPast = kTaps - 1;
  static constexpr int kChannels = kChannelsOfThread;  // of a thread, neighbours
  static constexpr int kBlockChannels = 32 * kChannels;
  static constexpr int kAhead = kTokensAhead;  // whose loads are on their way together
  static constexpr bool kWide = sizeof(Element) == 4;
  static constexpr int kForwardBlocks = kTaps > 4 ? 3 : kWide ? 5 : 6;  // on a multiprocessor: as many as leave
  static constexpr int kBackwardBlocks = kTaps > 4 ? 2 : 3;             // a thread its registers
};

/// Blocks of the same runs follow each other: together they read whole rows.
template <class Shape>
struct ConvBlock {
  int run, first_channel;

  KDA_DEVICE explicit ConvBlock(ShortConvCall const& p)
      : run(int(blockIdx.x) / p.channel_blocks),
        first_channel(int(blockIdx.x) % p.channel_blocks * Shape::kBlockChannels) {}
};

/// The weights of the block's channels, in fp32; zeros for absent taps and channels.
template <class Shape>
struct ConvWeights {
  float tap[Shape::kTaps][Shape::kBlockChannels];
  float bias[Shape::kBlockChannels];

  /// All threads of the block.
  KDA_DEVICE void load(ShortConvCall const& p, int first_channel) {
    with_elements(p.weight, p.weight_dtype, [&](auto const* weight) {
      int const absent = Shape::kTaps - p.taps;
      auto const* const biases = static_cast<decltype(weight)>(p.bias);
      for (int i = thread_index(); i < Shape::kBlockChannels; i += kConvThreads) {
        int const channel = first_channel + i;
        bool const there = channel < p.channels;
        float loaded[Shape::kTaps];
#pragma unroll
        for (int k = 0; k < Shape::kTaps; ++k)
          loaded[k] = there && k >= absent ? to_float(weight[int64_t(channel) * p.taps + k - absent]) : 0.f;
        bias[i] = there && biases ? to_float(biases[channel]) : 0.f;
#pragma unroll
        for (int k = 0; k < Shape::kTaps; ++k) tap[k][i] = loaded[k];
      }
    });
    sync_block();
  }
};

/// The tokens [begin, end) of one sequence, which a warp has.
struct ConvRun {
  int32_t sequence;
  int64_t batch_row, sequence_begin, sequence_end, begin, end;
  int count;                       // tokens
  bool exists, is_first, is_last;  // an empty sequence has one empty run, which is both

  KDA_DEVICE ConvRun(ChunkPlan const& plan, int64_t cell) {
    exists = cell < plan.cells();
    sequence = exists ? plan.sequence_of_cell(cell) : 0;
    Sequence const s = plan.sequence(sequence);
    int64_t const number = cell - s.first_cell;
    batch_row = s.batch_row, sequence_begin = s.begin, sequence_end = s.begin + s.length;
    begin = s.begin + number * plan.chunk, end = begin + plan.chunk;
    if (end > sequence_end) end = sequence_end;
    count = int(end - begin);
    is_first = number == 0, is_last = end == sequence_end;
    exists = exists && (begin < sequence_end || is_first);
  }
};

/// A thread's channels of one token after another: of what is read ahead, or of what is written.
template <class Shape>
struct ConvCursor {
  using E = typename Shape::Element;
  E* at;
  int64_t stride;

  KDA_DEVICE void fetch_next(typename Shape::Channels& to, bool exists) {
    if (exists) to.load(at);
    else to.bits = {};
    at += stride;
  }
  KDA_DEVICE void store_next(float const (&x)[Shape::kChannels], bool exists) {
    typename Shape::Channels piece;
    piece.pack(x);
    if (exists) piece.store(at);
    at += stride;
  }
};

/// Where a few neighbouring channels lie: in one stream.
struct ConvPlace {
  int stream, column;

  KDA_DEVICE ConvPlace(ShortConvCall const& p, int channel) {
    static_assert(kConvStreams == 3);
    stream = (channel >= p.stream_end[0]) + (channel >= p.stream_end[1]);
    column = channel - (stream == 0 ? 0 : stream == 1 ? p.stream_end[0] : p.stream_end[1]);
  }
  KDA_DEVICE ChannelRows of(ConvStreams const& streams) const {
    ChannelRows const &a = streams[0], &b = streams[1], &c = streams[2];
    return {stream == 0   ? a.data
            : stream == 1 ? b.data
                          : c.data,
            stream == 0   ? a.batch_stride
            : stream == 1 ? b.batch_stride
                          : c.batch_stride,
            stream == 0   ? a.token_stride
            : stream == 1 ? b.token_stride
                          : c.token_stride};
  }
};

/// One thread: where its channels lie.
template <class Shape>
struct ConvThread {
  using E = typename Shape::Element;
  ConvRun run;
  int channel;
  bool present;
  ConvPlace place;

  KDA_DEVICE ConvThread(ShortConvCall const& p, ConvBlock<Shape> const& block)
      : run(p.plan, int64_t(block.run) * kConvWarps + warp_index()),
        channel(block.first_channel + lane_index() * Shape::kChannels),
        present(run.exists && channel < p.channels),
        place(p, channel) {}

  KDA_DEVICE ConvCursor<Shape> cursor(ConvStreams const& streams, int64_t token) const {
    ChannelRows const rows = place.of(streams);
    E* const row = static_cast<E*>(rows.data) + run.batch_row * rows.batch_stride + token * rows.token_stride;
    return {row + place.column, rows.token_stride};
  }

  KDA_DEVICE void load_state(ConvStates const& states, int tap, float (&x)[Shape::kChannels]) const {
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c)
      x[c] = load_float(states.data, states.dtype, states.at(run.sequence, channel + c, tap));
  }
  KDA_DEVICE void store_state(ConvStates const& states, int tap, float const (&x)[Shape::kChannels]) const {
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c)
      store_float(states.data, states.dtype, states.at(run.sequence, channel + c, tap), x[c]);
  }

  /// The inputs before a token: of the sequence, then of its initial state, then zeros.
  KDA_DEVICE void load_window(ShortConvCall const& p, int64_t of,
                              float (&window)[Shape::kPast][Shape::kChannels]) const {
    int64_t token = of - Shape::kPast;
    ConvCursor<Shape> from = cursor(p.x, token);
#pragma unroll
    for (int k = 0; k < Shape::kPast; ++k, ++token, from.at += from.stride) {
      int64_t const before = token - run.sequence_begin + p.taps - 1;
#pragma unroll
      for (int c = 0; c < Shape::kChannels; ++c) window[k][c] = 0.f;
      if (token >= run.sequence_begin) {
        typename Shape::Channels piece;
        piece.load(from.at);
        piece.unpack(window[k]);
      } else if (p.initial_state.data && before >= 0) {
        load_state(p.initial_state, int(before), window[k]);
      }
    }
  }
};

/// A few channels' weights and bias in registers.
template <class Shape>
struct ConvFilter {
  float tap[Shape::kTaps][Shape::kChannels], bias[Shape::kChannels];
  int absent;

  KDA_DEVICE ConvFilter(ShortConvCall const& p, ConvWeights<Shape> const& weights) : absent(Shape::kTaps - p.taps) {
    int const first = lane_index() * Shape::kChannels;
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c) {
#pragma unroll
      for (int k = 0; k < Shape::kTaps; ++k) tap[k][c] = weights.tap[k][first + c];
      bias[c] = weights.bias[first + c];
    }
  }
  /// Whatever an absent tap would meet, it is not looked at: zero times infinity is no zero.
  KDA_DEVICE bool has(int k) const { return k >= Shape::kMaybeAbsent || k >= absent; }

  KDA_DEVICE void sums(float const (&window)[Shape::kPast][Shape::kChannels], float const (&x)[Shape::kChannels],
                       float (&z)[Shape::kChannels]) const {
#pragma unroll
    for (int c = 0; c < Shape::kChannels; ++c) z[c] = bias[c];
#pragma unroll
    for (int k = 0; k < Shape::kTaps; ++k) {
      if (!has(k)) continue;
#pragma unroll
      for (int c = 0; c < Shape::kChannels; ++c)
        z[c] = fmaf(tap[k][c], k < Shape::kPast ? window[k < Shape::kPast ? k : 0][c] : x[c], z[c]);
    }
  }
};

template <class Shape>
KDA_DEVICE void push(float (&window)[Shape::kPast][Shape::kChannels], float const (&x)[Shape::kChannels]) {
#pragma unroll
  for (int c = 0; c < Shape::kChannels; ++c) {
#pragma unroll
    for (int k = 0; k + 1 < Shape::kPast; ++k) window[k][c] = window[k + 1][c];
    window[Shape::kPast - 1][c] = x[c];
  }
}

/// Zeros for the tokens that no sequence has: what the last blocks of a grid do.
template <class Shape>
KDA_DEVICE void clear_unowned(ShortConvCall const& p, ConvStreams const& streams, ConvBlock<Shape> const& block) {
  using E = typename Shape::Element;
  int const channel = block.first_channel + lane_index() * Shape::kChannels;
  if (channel >= p.channels) return;
  ConvPlace const place(p, channel);
  ChannelRows const rows = place.of(streams);
  int64_t const first = int64_t(block.run - p.run_blocks) * kConvWarps + warp_index();
  for (int32_t side = 0; side < 2; ++side) {
    Sequence const range = unowned(p.plan, p.plan.sequences + side);
    for (int64_t t = first; t < range.length; t += kConvClearBlocks * kConvWarps)
      typename Shape::Channels{}.store(static_cast<E*>(rows.data) + (range.begin + t) * rows.token_stride +
                                       place.column);
  }
}

}  // namespace kda
