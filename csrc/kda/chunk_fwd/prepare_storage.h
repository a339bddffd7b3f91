// One team of the prepare kernel: its shared memory, and what each of its threads knows.
#pragma once
#include "kda/chunk_fwd/columns.h"
#include "kda/chunk_fwd/tile_rows.h"
#include "kda/chunk_fwd/workspace.h"
#include "tile/solve.h"

namespace kda {

struct WalkedChunk {
  ChunkOfHead chunk;
  int32_t slot;           // of the part
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
  bool steep[kWarps];
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

/// kTeams: of a block.
template <class Variant, int kTeams>
struct PrepareThread {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Storage = PrepareStorage<Variant>;
  using Record = ChunkRecord<Variant>;
  using DiagonalElement = std::conditional_t<sizeof(E) == 4, float, tile::Tf32>;  // of the diagonal blocks' inverses
  static constexpr int kChunk = Shape::kChunk, kBlocks = Shape::kBlocks, kGroups = Shape::kGroups;
  static constexpr int kThreads = Shape::kColumnThreads, kWarps = kThreads / 32;

  ChunkFwdParams const& p;
  Storage& s;
  ChunkRecordAt<Variant> out;
  Columns<E> columns;
  int const thread = index_in_team(), warp = thread / 32, lane = thread % 32;
  int const group = unsigned(thread) / Shape::kPairs, pair = unsigned(thread) % Shape::kPairs;

  /// The threads that work on one chunk; a block may have several such teams.
  KDA_DEVICE static void sync_team() { sync_named(1 + team(), kThreads); }
  KDA_DEVICE static int team() { return kTeams == 1 ? 0 : thread_index_anew() / kThreads; }
  KDA_DEVICE static int index_in_team() { return thread_index_anew() % (kTeams == 1 ? 1024 : kThreads); }

  /// Token j of this thread's eight, as given (until the scores write over it).
  KDA_DEVICE tile::Pair<E> raw_q(int j) const { return tile::load_pair<E>(&s.blocks.q.at(row(j), 2 * pair)); }
  KDA_DEVICE tile::Pair<E> raw_k(int j) const { return tile::load_pair<E>(&s.blocks.k.at(row(j), 2 * pair)); }
  /// The same, normalised.
  KDA_DEVICE float2 q(int j, tile::Pair<E> raw) const { return tile::to_float2<E>(raw) * both(s.norm[row(j)]); }
  KDA_DEVICE float2 k(int j, tile::Pair<E> raw) const {
    return tile::to_float2<E>(raw) * both(s.norm[kChunk + row(j)]);
  }
  KDA_DEVICE int row(int j) const { return group * kTokensPerThread + j; }
  KDA_DEVICE static float2 both(float x) { return {x, x}; }
  KDA_DEVICE static float2 exp2(float2 x) { return {decay_exp2<E>(x.x), decay_exp2<E>(x.y)}; }

  /// In shared memory or in the record, where a row of 64 channels is one line.
  template <class Tile>
  KDA_DEVICE void store(Tile& t, int row, float2 x) const {
    tile::store_pair<E>(&t.at(row, 2 * pair), tile::to_pair<E>(x.x, x.y));
  }
  /// log2 of the decay over the groups of tokens [first, end) of this thread's channels.
  KDA_DEVICE float2 log2_groups(int first, int end) const {
    float2 sum{0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
      if (i >= first && i < end) sum = sum + s.log2_total[i][pair];
    return sum;
  }
};

}  // namespace kda
