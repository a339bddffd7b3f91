// What the prepare kernel leaves for the backward beside a record.
#pragma once
#include "kda/chunk/record.h"
#include "tile/solve.h"

namespace kda {

/// What solves with I + Diag(beta) A_kk, together with ChunkRound::l: the backward needs it once more. And what is
/// known of the chunk by then.
template <class Variant>
struct alignas(ChunkRecord<Variant>) ChunkInverse {
  tile::DiagonalBlock diagonal[ChunkShape<Variant>::kBlocks];  // the inverses of the diagonal blocks
  ChunkFlags<ChunkShape<Variant>::kChunk> flags;
  alignas(16) float norm[2 * ChunkShape<Variant>::kChunk];  // 1 / |q|, then 1 / |k|; without l2norm 1
};

}  // namespace kda
