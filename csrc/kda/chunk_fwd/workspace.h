// What the prepare kernel hands to the scan: one record per workspace slot and value head, and T V in the place of o.
#pragma once
#include "kda/chunk_fwd/config.h"
#include "tile/shared_tile.h"

namespace kda {

/// With T = (I + Diag(beta) A_kk)^-1 Diag(beta). The scan copies each part to shared memory as it is: they are images
/// of its swizzled tiles.
template <class Variant>
struct alignas(128) ChunkRecord {
  using E = typename Variant::Element;
  static constexpr int kChunk = ChunkShape<Variant>::kChunk, kKeyTile = ChunkShape<Variant>::kKeyTile;
  using Wide = tile::SharedTile<E, kChunk, kKeyTile>;
  using Square = tile::SharedTile<E, kChunk, kChunk>;

  E w[kChunk * kKeyTile];        // T (Gamma.K)
  E gamma_q[kChunk * kKeyTile];  // scale * Gamma.Q
  E k_tilde[kChunk * kKeyTile];  // exp(G_C - G).K
  E a_qk[kChunk * kChunk];       // scale * A_qk, zero above the diagonal
  float gamma_c[kKeyTile];       // decay over the chunk
};

template <class Variant>
KDA_HOST_DEVICE ChunkRecord<Variant>& chunk_record(void* workspace, int64_t slot, int value_heads, int value_head) {
  return static_cast<ChunkRecord<Variant>*>(workspace)[slot * value_heads + value_head];
}

}  // namespace kda
