// Which chunk of which sequence is whose work, and where it lies in the workspace: said once, for host and device.
// Segments of many chunks are the chunks of a coarser plan.
//
// Sequence n has ceil(length / chunk) chunks. With cu_seqlens their cells begin at begin / chunk + n, which
// needs no prefix sum over the sequences (floor(a) + ceil(b - a) <= floor(b) + 1), so the host never reads cu_seqlens.
#pragma once
#include <cstdint>

#include "kda/indices.h"

namespace kda {

/// One sequence as the kernels see it; always inside the tensors, whatever cu_seqlens contains.
struct Sequence {
  int64_t batch_row;
  int64_t begin;  // first token in its batch row
  int64_t length;
  int64_t first_cell;
};

struct ChunkPlan {
  int64_t tokens;          // per batch row
  int32_t sequences;       // batch rows, or entries of cu_seqlens less one
  void const* cu_seqlens;  // [sequences + 1], int32 or int64; null: every batch row is one sequence
  bool cu_seqlens_is_int64;
  int64_t chunk;      // tokens
  Slots state_slots;  // with indices: a sequence whose slot is null counts as empty

  KDA_HOST_DEVICE int64_t chunks_of(int64_t length) const { return (length + chunk - 1) / chunk; }

  /// Cells, used or not; each holds one chunk of every head.
  KDA_HOST_DEVICE int64_t cells() const {
    return cu_seqlens ? tokens / chunk + sequences : int64_t(sequences) * chunks_of(tokens);
  }

  /// The same sequences in chunks of `tokens_of_chunk`.
  KDA_HOST_DEVICE ChunkPlan with_chunk(int64_t tokens_of_chunk) const {
    ChunkPlan plan = *this;
    plan.chunk = tokens_of_chunk;
    return plan;
  }

  KDA_DEVICE int64_t boundary(int32_t n) const {
    int64_t const t =
        cu_seqlens_is_int64 ? static_cast<int64_t const*>(cu_seqlens)[n] : static_cast<int32_t const*>(cu_seqlens)[n];
    return t < 0 ? 0 : t > tokens ? tokens : t;
  }

  KDA_DEVICE Sequence sequence(int32_t n) const {
    if (!cu_seqlens) return {n, 0, is_null(n) ? 0 : tokens, n * chunks_of(tokens)};
    int64_t const begin = boundary(n), end = boundary(n + 1);
    return {0, begin, end > begin && !is_null(n) ? end - begin : 0, begin / chunk + n};
  }

  KDA_DEVICE bool is_null(int32_t n) const { return state_slots.index.data && state_slots.of(n) < 0; }

  /// The sequence whose cells contain `cell`: the last one that starts at or before it.
  KDA_DEVICE int32_t sequence_of_cell(int64_t cell) const {
    if (!cu_seqlens) return int32_t(uint32_t(cell) / uint32_t(chunks_of(tokens)));  // a grid's size: 31 bits
    int32_t low = 0, high = sequences - 1;
    while (low < high) {
      int32_t const middle = (low + high + 1) / 2;
      if (boundary(middle) / chunk + middle <= cell) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

}  // namespace kda
