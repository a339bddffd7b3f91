// What the prepare kernel hands to the scan: one record per cell and value head.
#pragma once
#include "kda/chunk/inputs.h"
#include "kda/chunk/shape.h"
#include "tile/shared_tile.h"

namespace kda {

/// What a chunk does to the state. With T = (I + Diag(beta) A_kk)^-1 Diag(beta).
template <class Variant>
struct ChunkTransition {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Wide = tile::SharedTile<E, Shape::kChunk, Shape::kKeyTile>;
  using Square = tile::SharedTile<E, Shape::kChunk, Shape::kChunk>;
  using Values = tile::SharedTile<E, Shape::kChunk, kValueTile>;

  Wide w;                          // T (Gamma.K)
  Wide k_tilde;                    // exp(G_C - G).K
  float gamma_c[Shape::kKeyTile];  // decay over the chunk

  /// Up to here there is something in it; the next tile begins at a multiple of 1024 bytes.
  static constexpr int kBytes = int(2 * sizeof(Wide) + sizeof(gamma_c));
};

/// And what its outputs need. The same in global and in shared memory, swizzles included, so that a record, or its
/// transition, moves as one run of bytes.
template <class Variant>
struct ChunkRecord : ChunkTransition<Variant> {
  typename ChunkTransition<Variant>::Wide gamma_q;  // scale * Gamma.Q
  typename ChunkTransition<Variant>::Square a_qk;   // scale * A_qk, zero above the diagonal

  /// From gamma_q on.
  static constexpr int kOutputBytes = int(sizeof(gamma_q) + sizeof(a_qk.data));
};

/// What the backward knows of a chunk's tokens beside its record.
template <int kChunk>
struct ChunkFlags {
  alignas(16) uint32_t has_small_beta;   // a share is not 1
  uint32_t steep;                        // the scores were made by splits
  uint32_t nothing[2];                   // zero, since all of it is copied
  alignas(16) float beta_share[kChunk];  // gate_columns.h
};

/// How far the records and the carried states have come, where the kernels of all rounds run beside each other:
/// counters (flags.h), zero at first. Every kernel waits only for kernels launched before it.
struct Progress {
  uint32_t* ready;  // of a record: the last round that it was written in, plus one
  uint32_t* freed;  // of the same: by how many blocks of scans it was read, of all rounds; cells without a chunk count
                    // as read
};
inline constexpr int kCountersPerRecord = 2;
KDA_HOST_DEVICE int64_t progress_counters(int64_t records, int value_heads, int value_dim) {
  return int64_t(value_heads) * value_tiles(value_dim) + kCountersPerRecord * records;
}
KDA_DEVICE Progress progress_of_record(ChunkCall const& p, int64_t cell, int value_head) {
  uint32_t* const at = p.progress + progress_counters(cell * p.value_heads + value_head, p.value_heads, p.value_dim);
  return {at, at + 1};
}
/// Of the state that goes on into the next round, 64 columns of V: the last round that left it, plus one.
KDA_DEVICE uint32_t* carry_ready(ChunkCall const& p, int value_head, int value_tile) {
  return p.progress + value_head * value_tiles(p.value_dim) + value_tile;
}

/// A cell of the workspace: the record, and behind it T V, `value_tiles` tiles.
template <class Variant>
struct ChunkRecordAt {
  using Record = ChunkRecord<Variant>;
  char* bytes = nullptr;

  ChunkRecordAt() = default;
  /// `cell`: of the round.
  KDA_DEVICE ChunkRecordAt(ChunkRound const& p, int64_t cell, int value_head)
      : bytes(static_cast<char*>(p.workspace) + (cell * p.round_heads + (value_head - p.first_head)) * p.cell_bytes) {}
  KDA_DEVICE Record& record() const { return *reinterpret_cast<Record*>(bytes); }
  KDA_DEVICE typename Record::Values& values(int tile) const {
    return reinterpret_cast<typename Record::Values*>(bytes + sizeof(Record))[tile];
  }
};

}  // namespace kda
