// What the chunkwise forward reads and writes.
#pragma once
#include "kda/chunk/inputs.h"

namespace kda {

struct ChunkFwdParams : ChunkCall {
  Rows o;  // [batch, tokens, value_heads, value_dim], Element

  StateRef initial_state;         // a null slot reads as zero
  bool const* has_initial_state;  // [sequences]; false: starts from zero; null: every sequence has one
  StateRef final_state;           // null slots are not written, here and below
  StateRef checkpoints;           // column j of sequence n: its state after (j + 1) * checkpoint_tokens tokens
  int32_t checkpoint_tokens;      // a multiple of plan.chunk
  StateRef chunk_states;          // row r: the r-th state before a multiple of chunk_state_tokens, of all sequences
  int32_t chunk_state_tokens;     // a multiple of plan.chunk

  bool clear_unowned;  // o is zero for null sequences and outside of all sequences; else it is not written there
};

}  // namespace kda
