// What the prepare kernel leaves for the backward beside a record.
#pragma once
#include "kda/chunk/record.h"
#include "tile/solve.h"

namespace kda {

/// What solves with I + Diag(beta) A_kk: the backward needs it once more.
template <class Variant>
struct ChunkInverse {
  typename ChunkTransition<Variant>::Square l;                 // Diag(beta) A_kk below its diagonal blocks
  tile::DiagonalBlock diagonal[ChunkShape<Variant>::kBlocks];  // the inverses of its diagonal blocks
};

}  // namespace kda
