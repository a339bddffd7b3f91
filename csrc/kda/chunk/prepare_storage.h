// The shared memory of one team of the prepare kernel.
#pragma once
#include "kda/chunk/column_thread.h"
#include "kda/chunk/inverse.h"

namespace kda {

struct WalkedChunk {
  ChunkOfHead chunk;
  int32_t cell;           // of the round
  int64_t index, length;  // in its sequence, of so many tokens
};

template <class Variant>
struct PrepareStorage {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Wide = typename ChunkRecord<Variant>::Wide;
  using Square = typename ChunkRecord<Variant>::Square;
  static constexpr int kChunk = Shape::kChunk, kBlocks = Shape::kBlocks, kWarps = Shape::kColumnThreads / 32;

  struct Blocks {    // at first q, k and g as given, g in the place of k_inverse (and, in fp32, of what follows)
    Wide q, k;       // operands of scores.h, BlockScores. Rows: times the decay since the anchor of their 16 tokens
    Wide k_inverse;  // columns: over it
  };
  struct Split {                                        // operands of one level of SplitScores
    tile::SharedTile<E, kChunk, Shape::kKeyTile> rows;  // per split: q of its upper half, then k of its upper half
    tile::SharedTile<E, (kChunk > 32 ? kChunk / 2 : 16), Shape::kKeyTile> cols;  // per split: k of its lower half
  };
  union {
    Blocks blocks;
    Split split[2];  // levels alternate
  };
  Wide gamma_k;                           // Gamma.K, then W
  Wide v;                                 // V, then T V
  Square l;                               // Diag(beta) A_kk below its diagonal blocks
  tile::DiagonalBlock diagonal[kBlocks];  // those blocks; then their inverses
  Square a_qk;
  float2 log2_total[Shape::kGroups][Shape::kPairs];                      // log2 of the decay over each eight tokens
  tile::Pair<E> factor[kBlocks * (kBlocks - 1) / 2 + 1][Shape::kPairs];  // decay between the anchors of two blocks
  float dots[Shape::kWarpsPerGroup][kChunk];                             // of q and k, partial sums over channels
  float norm[2 * kChunk], beta[kChunk];                                  // 1 / |q|, then 1 / |k|
  float gate_bias[Shape::kKeyTile], gate_amplitude;
  bool steep[kWarps], has_small_beta[kChunk];
  WalkedChunk walk[2];  // this turn's and the next one's

  template <class G>
  KDA_DEVICE auto& gate() {
    return reinterpret_cast<tile::SharedTile<G, kChunk, Shape::kKeyTile>&>(blocks.k_inverse);
  }
};

/// Of the prepare kernel, that an SM has registers and shared memory for: 64 registers a thread, in fp32 128.
template <class Variant>
constexpr int prepare_teams() {
  int const by_registers = (sizeof(typename Variant::Element) == 4 ? 512 : 1024) / ChunkShape<Variant>::kColumnThreads,
            by_memory = int(size_t(227 << 10) / sizeof(PrepareStorage<Variant>));
  return by_registers < by_memory ? by_registers : by_memory;
}

}  // namespace kda
