// Which block does what: a sequence, a value head, a run of values; and where the sequence's states lie.
#pragma once
#include "kda/decode/config.h"
#include "kda/elements.h"

namespace kda {

struct DecodeWork {
  int32_t sequence, value_head, head, first_value;
  int64_t batch_row, begin, tokens;  // of the sequence; always inside the tensors, whatever cu_seqlens contains
  int64_t others;                    // the first token after the last sequence

  /// Block i of a grid of sequences x heads x tiles, neighbours in memory next to each other.
  KDA_DEVICE DecodeWork(DecodeParams const& p, int heads, int value_tile) {
    uint32_t const tiles = uint32_t(p.value_dim + value_tile - 1) / uint32_t(value_tile);  // unsigned is quicker
    uint32_t const block = blockIdx.x, row = block / tiles, group = uint32_t(p.value_heads) / uint32_t(p.heads);
    first_value = int32_t(block % tiles) * value_tile;
    sequence = int32_t(row / uint32_t(heads)), value_head = int32_t(row % uint32_t(heads));
    head = group == 1 ? value_head : int32_t(uint32_t(value_head) / group);
    batch_row = sequence, begin = 0, tokens = others = p.tokens;
    if (p.cu_seqlens.data) {
      int64_t const end = boundary(p, sequence + 1);
      others = boundary(p, p.sequences);
      batch_row = 0, begin = boundary(p, sequence);
      tokens = end > begin ? end - begin : 0;
    }
  }

  KDA_DEVICE int64_t offset(RowStrides const& s, int64_t t, int of_head) const {
    return batch_row * s.batch + (begin + t) * s.token + of_head * s.head;
  }
  /// Where token t lies in a record: [batch, tokens, heads, dim], contiguous.
  KDA_DEVICE int64_t record_offset(DecodeParams const& p, int64_t t, int heads, int of_head, int dim) const {
    return ((batch_row * p.tokens + begin + t) * heads + of_head) * dim;
  }

  /// The token whose state token t starts from; -1: the state in the pool. Before t, whatever `parents` contains.
  KDA_DEVICE int64_t parent(DecodeParams const& p, int64_t t) const {
    int64_t const given = p.parents.at(batch_row, begin + t);
    return given < -1 ? -1 : given < t ? given : t - 1;
  }

  /// The slot in `column` of the sequence's slots; negative: a null slot.
  KDA_DEVICE int64_t slot(StatePool const& pool, DecodeParams const& p, int64_t column) const {
    int64_t slot = sequence;
    if (pool.slot_of.data) {
      if (column >= pool.slot_of.columns) return -1;
      slot = pool.slot_of.at(sequence, column);
      if (p.zero_is_null && slot == 0) return -1;
    }
    return slot < pool.slots ? slot : -1;
  }
  /// Elements before this head's state in that slot; negative: a null slot.
  KDA_DEVICE int64_t state_offset(StatePool const& pool, DecodeParams const& p, int64_t column) const {
    int64_t const i = slot(pool, p, column);
    return i < 0 ? -1 : i * pool.slot_stride + int64_t(value_head) * p.key_dim * p.value_dim;
  }
  /// Whether a sequence without tokens has nothing to write: there is no new state, or it lies at `from` already.
  KDA_DEVICE bool keeps_state(DecodeParams const& p, int64_t from) const {
    if (!p.new_state.data) return true;
    return p.new_state.data == p.state.data && state_offset(p.new_state, p, 0) == from;
  }
  /// The column of the state to start from.
  KDA_DEVICE int64_t first_column(DecodeParams const& p) const {
    if (!p.accepted.data) return 0;
    int64_t const accepted = p.accepted.at(sequence), columns = p.state.slot_of.columns;  // anything, where it is null
    return (accepted < 1 ? 1 : accepted < columns ? accepted : columns) - 1;
  }

 private:
  KDA_DEVICE static int64_t boundary(DecodeParams const& p, int32_t n) {
    int64_t const t = p.cu_seqlens.at(n);
    return t < 0 ? 0 : t > p.tokens ? p.tokens : t;
  }
};

/// The tokens of a chain that commit takes; inside the sequence, whatever `accepted` contains.
struct AcceptedChain {
  int64_t length;

  KDA_DEVICE AcceptedChain(DecodeParams const& p, DecodeWork const& work) : length(work.tokens) {
    int64_t const accepted = p.accepted.at(work.sequence);
    if (accepted < work.tokens) length = accepted > 0 ? accepted : 0;
  }
  /// The i-th of them.
  KDA_DEVICE int64_t token(DecodeParams const&, DecodeWork const&, int64_t i) const { return i; }
};

/// The tokens from the root of a tree to `last`; below 0: none.
struct TreePath {
  int64_t last, length;

  KDA_DEVICE TreePath(DecodeParams const& p, DecodeWork const& work, int64_t end) : last(end), length(0) {
    for (int64_t t = last; t >= 0; t = work.parent(p, t)) ++length;
  }
  /// Those that commit takes; inside the sequence, whatever `accepted` contains.
  KDA_DEVICE TreePath(DecodeParams const& p, DecodeWork const& work)
      : TreePath(p, work, p.accepted.at(work.sequence) < work.tokens ? p.accepted.at(work.sequence) : work.tokens - 1) {
  }
  /// The i-th of them.
  KDA_DEVICE int64_t token(DecodeParams const& p, DecodeWork const& work, int64_t i) const {
    int64_t t = last;
    for (int64_t above = length - 1; above > i; --above) t = work.parent(p, t);
    return t;
  }
};

/// One element of a tensor whose dtype only the parameters know.
KDA_DEVICE float load_as_float(void const* from, bool is_fp32, Dtype otherwise, int64_t i) {
  return load_float(from, is_fp32 ? Dtype::kFloat32 : otherwise, i);
}

}  // namespace kda
