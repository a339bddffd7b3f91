// What the chunkwise forward reads and writes.
#pragma once
#include <cstdint>

#include "kda/chunk_plan.h"
#include "kda/gate.h"

namespace kda {

/// Elements between neighbours; the last dimension is contiguous.
struct TokenStrides {
  int64_t batch, token, head;
};

enum class StateType : int32_t { kFloat32, kBfloat16, kFloat16 };

/// A set of K x V states, one per sequence and value head.
struct StateRef {
  void* data;              // [slots, value_heads, key_dim, value_dim] or [..., value_dim, key_dim]; null: absent
  int32_t const* slot_of;  // [sequences]; null: sequence n uses slot n; negative: null slot (zeros, never written)
  int64_t slots;           // slot_of beyond it is treated as a null slot
  int64_t slot_stride;     // elements
  StateType type;
  bool value_first;  // [..., value_dim, key_dim]
};

struct ChunkFwdParams {
  void const* q;     // [batch, tokens, heads, key_dim], Element
  void const* k;     // [batch, tokens, heads, key_dim], Element
  void const* v;     // [batch, tokens, value_heads, value_dim], Element
  void const* g;     // [batch, tokens, value_heads, key_dim], Element or fp32: log-decay, or its pre-activation
  void const* beta;  // [batch, tokens, value_heads], Element or fp32
  void* o;           // [batch, tokens, value_heads, value_dim], Element
  TokenStrides q_strides, k_strides, v_strides, g_strides, beta_strides, o_strides;
  bool g_is_fp32, beta_is_fp32;
  bool q_pairs_aligned, k_pairs_aligned, g_pairs_aligned;  // two elements can be loaded at once
  bool v_pieces_aligned, o_pieces_aligned;                 // 16 bytes can be moved at once

  ChunkPlan plan;
  int32_t heads, value_heads, key_dim, value_dim;
  float scale;
  bool l2norm, beta_sigmoid, neg_eigval;
  GateParams gate;

  StateRef initial_state;
  bool const* has_initial_state;  // [sequences]; null: every sequence has one
  StateRef final_state;
  void* chunk_states;        // [rows, value_heads, K, V] (or V, K): states at multiples of chunk_state_tokens; or null
  int64_t chunk_state_rows;  // rows beyond it are not written
  StateType chunk_states_type;
  int32_t chunk_state_tokens;  // a multiple of plan.chunk
  bool chunk_states_value_first;

  void* workspace;  // chunk_fwd_workspace_bytes(...)
};

}  // namespace kda
