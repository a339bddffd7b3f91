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

/// A set of K x V states, for every value head.
struct StateRef {
  void* data;  // [slots, value_heads, key_dim, value_dim] or [..., value_dim, key_dim]; null: absent
  Slots slots;
  int64_t slot_stride;  // elements
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
  bool q_pieces_aligned, k_pieces_aligned, v_pieces_aligned, g_pieces_aligned, o_pieces_aligned;  // 16 bytes at once

  ChunkPlan plan;
  int32_t heads, value_heads, key_dim, value_dim;
  float scale;
  bool l2norm, beta_sigmoid, neg_eigval;
  GateParams gate;

  StateRef initial_state;         // a null slot reads as zero
  bool const* has_initial_state;  // [sequences]; false: starts from zero; null: every sequence has one
  StateRef final_state;           // null slots are not written, here and below
  StateRef checkpoints;           // column j of sequence n: its state after (j + 1) * checkpoint_tokens tokens
  int32_t checkpoint_tokens;      // a multiple of plan.chunk
  StateRef chunk_states;          // row r: the r-th state before a multiple of chunk_state_tokens, of all sequences
  int32_t chunk_state_tokens;     // a multiple of plan.chunk

  bool clear_unowned;    // o is zero for null sequences and outside of all sequences; else it is not written there
  bool batch_invariant;  // the bits of a sequence may not depend on what it is batched with

  void* workspace;  // ChunkFwdVariant::workspace_bytes, aligned to 16
  // The part of the work that one launch of each kernel covers: slots [first_slot, first_slot + part_slots) of the
  // plan.
  int64_t first_slot;
  int32_t part_slots, part;
  int32_t walkers;     // of the prepare kernel, for each value head: teams of threads, each of which takes every
                       // walkers-th slot
  bool last_first;     // they begin with the last slots: the first ones are then in the L2 when the scan reads them
  bool more_parts;     // another one follows, in the same records
  uint32_t* progress;  // workspace.h: what kernels that run beside each other wait for; null: they do not
  float* carry;  // [2, value_heads, ...]: the state of the sequence that goes on into the next part (segments.h, rows)
  int64_t segment_tokens;  // of the scan, a multiple of plan.chunk; not split: more than any sequence has
  float* segments;         // [segments of the part, value_heads, ...], segments.h; null: not split
};

}  // namespace kda
