// The causal depthwise convolution of a few taps: forward, and backward with every gradient.
#pragma once
#include <cstdint>

#include "kda/activation.h"
#include "kda/chunk/plan.h"
#include "kda/dtype.h"

namespace kda {

/// [batch, tokens, channels] in the element type of the call; channels are contiguous. Strides in elements.
struct ChannelRows {
  void* data;
  int64_t batch_stride, token_stride;
};

/// The last inputs of each sequence, [sequences, channels, taps - 1], the latest in the end. Strides in elements.
struct ConvStates {
  void* data;  // null: absent
  Dtype dtype;
  int64_t sequence_stride, channel_stride, tap_stride;

  KDA_DEVICE int64_t at(int32_t sequence, int channel, int tap) const {
    return sequence * sequence_stride + channel * channel_stride + tap * tap_stride;
  }
};

/// Tensors whose channels are side by side in one call, such as those of q, k and v.
inline constexpr int kConvStreams = 3;
using ConvStreams = ChannelRows[kConvStreams];

/// y_t = activation(bias + sum_j weight_j x_{t - taps + 1 + j}), for each channel.
struct ShortConvCall {
  ConvStreams x;
  int32_t stream_end[kConvStreams];  // stream i has the channels before this one that no earlier stream has
  void const* weight;                // [channels, taps]
  void const* bias;                  // [channels]; null: none
  Dtype weight_dtype;                // of both
  ConvStates initial_state;
  ChunkPlan plan;  // its chunks are the runs of tokens that warps have
  int32_t channels, taps;
  Activation activation;
  bool in_pieces;          // 16 bytes can be moved at once, everywhere
  int32_t run_blocks;      // each of kConvWarps runs; set by the plan
  int32_t channel_blocks;  // set by the plan
};
struct ShortConvFwdParams : ShortConvCall {
  ConvStreams y;
  ConvStates final_state;
};
struct ShortConvBwdParams : ShortConvCall {
  ConvStreams dy, dx;
  ConvStates d_final_state, d_initial_state;
  void* dweight;   // [channels, taps]
  void* dbias;     // [channels]; null: none
  float* partial;  // [run_blocks, taps + 1, channels], added in order, so bits never vary
};

inline constexpr int kConvWarps = 4, kConvThreads = 32 * kConvWarps, kConvSumThreads = 256, kConvSumColumns = 32;
inline constexpr int kConvClearBlocks = 8;  // for the tokens that no sequence has
inline constexpr int kConvShortestRun = 8, kConvLongestRun = 256;
inline constexpr int kConvRunCost = 12;           // what a run costs beside its tokens, in tokens
inline constexpr int kConvMultiprocessors = 132;  // of an H100, which the lengths of runs are made for

/// Tokens of a run, from shapes alone, so that bits are those of every GPU: as few turns of all multiprocessors as
/// there can be, with `blocks_at_once` on each, none of them half empty.
inline int64_t conv_run_tokens(int64_t tokens, int64_t channel_blocks, int blocks_at_once) {
  int64_t best = kConvShortestRun, least = INT64_MAX;
  for (int64_t run = kConvShortestRun; run <= kConvLongestRun; run += kConvShortestRun) {
    int64_t const blocks = (tokens + kConvWarps * run - 1) / (kConvWarps * run) * channel_blocks;
    int64_t const at_once = kConvMultiprocessors * blocks_at_once, turns = (blocks + at_once - 1) / at_once;
    int64_t const cost = turns * (run + kConvRunCost);
    if (cost <= least) best = run, least = cost;
  }
  return best;
}
inline int32_t conv_run_blocks(ChunkPlan const& plan) { return int32_t((plan.cells() + kConvWarps - 1) / kConvWarps); }

}  // namespace kda
