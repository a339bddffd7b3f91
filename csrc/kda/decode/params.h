// What the decoding kernels read and write: a few tokens per sequence on top of a pool of states.
#pragma once
#include "kda/dtype.h"
#include "kda/gate.h"
#include "kda/indices.h"
#include "kda/rows.h"

namespace kda {

/// An element of a state of bf16 or fp16: which of them, the parameters say. They differ in how 16 bits become a number
/// and back, once a call, so that one kernel serves both.
struct Bits16 {
  uint16_t bits;
};

struct StatePool {
  void* data;           // [slots, value_heads, value_dim, key_dim], or [..., key_dim, value_dim]; null: absent
  int64_t slots;        // an index beyond them is a null slot
  int64_t slot_stride;  // elements
  Indices slot_of;      // [sequences, columns]; absent: sequence n has slot n
};

/// What commit needs of a token: S_t = Diag(exp g) S_{t-1} + k u^T. Contiguous, fp32, indexed like q.
struct DecodeRecords {
  float* k;  // [batch, tokens, heads, key_dim], normalised; null: no records
  float* u;  // [batch, tokens, value_heads, value_dim]
  float* g;  // [batch, tokens, value_heads, key_dim], log-decay
};

struct DecodeParams {
  void const* q;     // [batch, tokens, heads, key_dim]
  void const* k;     // [batch, tokens, heads, key_dim]
  void const* v;     // [batch, tokens, value_heads, value_dim]
  void const* g;     // [batch, tokens, value_heads, key_dim]: log-decay, or its pre-activation
  void const* beta;  // [batch, tokens, value_heads]
  void* o;           // [batch, tokens, value_heads, value_dim]
  RowStrides q_strides, k_strides, v_strides, g_strides, beta_strides, o_strides;
  Dtype dtype;  // of q, k, v, o; of g and beta unless they are fp32
  bool g_is_fp32, beta_is_fp32;

  int64_t tokens;      // per batch row
  int32_t sequences;   // batch rows, or entries of cu_seqlens less one
  Indices cu_seqlens;  // [sequences + 1]; absent: every batch row is one sequence
  int32_t heads, value_heads, key_dim, value_dim;
  float scale;
  bool l2norm, beta_sigmoid, neg_eigval;
  GateParams gate;

  Dtype state_dtype;      // of both pools
  bool value_first;       // states are [value_dim, key_dim]
  bool zero_is_null;      // slot 0 is a null slot, as every negative one is: zero output, nothing written
  StatePool state;        // read; without data every sequence starts from zero
  Indices accepted;       // [sequences]: start from column accepted - 1 of state.slot_of; absent: from column 0
  StatePool new_state;    // may be `state` itself; without data nothing is written
  bool every_token;       // the state after token t goes to column t of new_state.slot_of; else the last to column 0
  DecodeRecords records;  // written if there; the state then stays as it was
  Indices parents;        // [batch, tokens]: whose state a token starts from; absent: that of the token before
};

/// decode_commit: the first `accepted` tokens of every sequence, from their records; `state` is read and written. With
/// parents, `accepted` is a token of each sequence, and those from the root of its tree to it are meant; below 0: none.
/// Uses tokens, sequences, cu_seqlens, parents, sizes, states, records (read) and accepted.
using DecodeCommitParams = DecodeParams;

}  // namespace kda
