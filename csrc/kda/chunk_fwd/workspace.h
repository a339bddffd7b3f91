// What the prepare kernel hands to the scan: one record per workspace slot and value head.
#pragma once
#include "kda/chunk_fwd/config.h"
#include "tile/shared_tile.h"

namespace kda {

/// The scan copies `a_qk` and `t` to shared memory as they are: both are images of its swizzled tiles.
template <class Variant>
struct alignas(16) ChunkRecord {
  using E = typename Variant::Element;
  static constexpr int kChunk = ChunkShape<Variant>::kChunk;
  using Square = tile::SharedTile<E, kChunk, kChunk>;

  E t[kChunk * kChunk];     // (I + Diag(beta) A_kk)^-1 Diag(beta)
  E a_qk[kChunk * kChunk];  // scale * A_qk, zero above the diagonal
  float q_norm[kChunk];     // 1 / |q_r|, or 1
  float k_norm[kChunk];
};

template <class Variant>
KDA_HOST_DEVICE ChunkRecord<Variant>& chunk_record(void* workspace, int64_t slot, int value_heads, int value_head) {
  return static_cast<ChunkRecord<Variant>*>(workspace)[slot * value_heads + value_head];
}

}  // namespace kda
