// What the prepare kernel hands to the scan: one record per workspace slot and value head.
#pragma once
#include "kda/chunk_fwd/config.h"
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
};

/// And what its outputs need. The same in global and in shared memory, swizzles included, so that a record, or its
/// transition, moves as one run of bytes.
template <class Variant>
struct ChunkRecord : ChunkTransition<Variant> {
  typename ChunkTransition<Variant>::Wide gamma_q;  // scale * Gamma.Q
  typename ChunkTransition<Variant>::Square a_qk;   // scale * A_qk, zero above the diagonal
};

/// Behind each record: T V, `value_tiles` tiles.
template <class Variant>
KDA_HOST_DEVICE size_t chunk_record_bytes(int value_dim) {
  return sizeof(ChunkRecord<Variant>) + value_tiles(value_dim) * sizeof(typename ChunkRecord<Variant>::Values);
}

template <class Variant>
struct ChunkRecordAt {
  using Record = ChunkRecord<Variant>;
  char* bytes = nullptr;

  ChunkRecordAt() = default;
  KDA_DEVICE ChunkRecordAt(void* workspace, int64_t slot, int value_heads, int value_head, int value_dim)
      : bytes(static_cast<char*>(workspace) +
              (slot * value_heads + value_head) * int64_t(chunk_record_bytes<Variant>(value_dim))) {}
  KDA_DEVICE Record& record() const { return *reinterpret_cast<Record*>(bytes); }
  KDA_DEVICE typename Record::Values& values(int tile) const {
    return reinterpret_cast<typename Record::Values*>(bytes + sizeof(Record))[tile];
  }
};

}  // namespace kda
