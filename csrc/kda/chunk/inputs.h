// What every chunkwise operation is given, and which round of the work one launch covers.
#pragma once
#include "kda/chunk/plan.h"
#include "kda/gate.h"
#include "kda/rows.h"
#include "kda/states.h"

namespace kda {

struct ChunkInputs {
  Rows q;     // [batch, tokens, heads, key_dim]
  Rows k;     // [batch, tokens, heads, key_dim]
  Rows v;     // [batch, tokens, value_heads, value_dim]
  Rows g;     // [batch, tokens, value_heads, key_dim], fp32 or not: log-decay, or its pre-activation
  Rows beta;  // [batch, tokens, value_heads], fp32 or not

  ChunkPlan plan;
  int32_t heads, value_heads, key_dim, value_dim;
  float scale;
  bool l2norm, beta_sigmoid, neg_eigval;
  GateParams gate;

  bool batch_invariant;  // the bits of a sequence may not depend on what it is batched with
};

/// The round of the work that one launch covers: cells [first_cell, first_cell + round_cells) of the plan, and the
/// value heads [first_head, first_head + round_heads).
struct ChunkRound {
  void* workspace;         // the records of the round (record.h)
  int64_t cell_bytes;      // of one chunk of one value head there
  int32_t inverse_offset;  // in a cell: where the prepare kernel leaves a ChunkInverse; 0: it does not
  int32_t first_head, round_heads;
  int64_t first_cell;
  int32_t round_cells, round_index;
  int32_t walkers;         // of the prepare kernel, for each value head: teams of threads, each of which takes every
                           // walkers-th cell
  bool last_first;         // they begin with the last cells: the first ones are then in the L2 when the scan reads them
  bool more_rounds;        // another one follows, in the same records
  uint32_t* progress;      // record.h: what kernels that run beside each other wait for; null: they do not
  float* carry;            // [2, value_heads, ...]: the state of the sequence that goes on into the next round
  int64_t segment_tokens;  // of the scan, a multiple of plan.chunk; not split: more than any sequence has
  float* segments;         // [segments of the round, value_heads, ...], segments.h; null: not split

  // Of the backward, [batch, tokens, value_heads, ...], Element: where the prepare kernel leaves rows of its own
  // tokens.
  Rows w;  // W, key_dim columns; absent: it lies in the record
  Rows l;  // Diag(beta) A_kk below its diagonal blocks, plan.chunk columns; absent: nobody needs it
};

/// What the kernels that all chunkwise operations share are launched with.
struct ChunkCall : ChunkInputs, ChunkRound {};

}  // namespace kda
