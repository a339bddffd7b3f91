// What the chunkwise backward reads and writes.
#pragma once
#include "kda/chunk/inputs.h"

namespace kda {

/// Of ChunkRound `w` and `l` are given only where dk and dq have no room for them (ChunkBwdScratch).
struct ChunkBwdParams : ChunkCall {
  Rows d_o;                // [batch, tokens, value_heads, value_dim], Element
  StateRef d_final_state;  // absent: zero
  StateRef initial_state;  // absent: zero

  // Gradients, contiguous. Without data they are not wanted.
  Rows dq, dk;  // [batch, tokens, heads, key_dim], Element; of grouped heads: fp32, one for each value head
  Rows dv;      // [batch, tokens, value_heads, value_dim], Element
  Rows dg;      // [batch, tokens, value_heads, key_dim], as g
  Rows dbeta;   // [batch, tokens, value_heads], as beta
  StateRef d_initial_state;
  float* dA_log;    // [value_heads]
  float* ddt_bias;  // [value_heads, key_dim]

  void *dq_sum, *dk_sum;  // [batch, tokens, heads, key_dim], Element: the sums of grouped heads; null: heads have one
};

}  // namespace kda
