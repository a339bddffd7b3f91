// The whole of a KDA layer between its projections, for one token a sequence.
#pragma once
#include "kda/decode/params.h"

namespace kda {

inline constexpr int kConvTaps = 4;

/// The causal convolutions of q, k and v, one tap filter per channel, then SiLU.
struct ShortConvParams {
  void const* weight[3];  // of q, k, v: [heads * dim, kConvTaps], contiguous
  void* state;            // [slots, 3 * heads * dim, kConvTaps - 1]: the last inputs of q | k | v, updated in place
  int64_t slots, slot_stride, channel_stride, tap_stride;  // elements
  bool weight_is_fp32, state_is_fp32;                      // else the dtype of q
};

struct DecodeLayerParams {
  DecodeParams step;        // q, k, v: before the convolutions; one token, value_heads = heads, value_dim = key_dim
  ShortConvParams conv;     // its slots are those of step.state
  void const* output_gate;  // [batch, 1, heads, dim], pre-activation, dtype of q
  RowStrides output_gate_strides;
  void const* norm_weight;  // [dim]
  bool norm_weight_is_fp32;
  float norm_eps;
};

}  // namespace kda
