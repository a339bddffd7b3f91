// What the kernels of the backward hand to each other: a cell for each chunk of each value head of a round.
//
//   prepare    writes the record but W, T V and the inverse
//   scan       reads the record; writes U over T V, S_0 and dS_C
//   values     reads K~, A_qk, the inverse, L, U and dS_C; writes ChunkResults over the record, but for sums over
//              tokens. A block has a cell for itself, so nobody reads what it writes over
//   keys       reads U, S_0, dS_C and the gradients of the scores; writes what one chunk adds to dA_log and ddt_bias
//   reduce     sums these
//
// W and L (ChunkRound::w and l) are not in cells. They lie where the keys kernel writes dk and dq later, in rows of the
// same tokens: nobody reads them by then. The place of W in a record, its first bytes, belongs to the cell before.
#pragma once
#include "kda/chunk/inverse.h"

namespace kda {

/// scale dO U^T and -dX U^T, lower triangles without the diagonal.
template <class Variant>
struct ScoreGradients {
  typename ChunkRecord<Variant>::Square qk, kk;
};

/// What a block of the keys kernel has of a chunk: all channels or, where it has wgmma, a slice of 64. Two blocks of
/// half the size are seldom at the same phase, so that one computes while the other waits.
template <class Variant>
struct KeysSlice : Variant {
  static constexpr ChunkConfig slice(ChunkConfig config) {
    if (config.wgmma) config.key_tile = 64;
    return config;
  }
  static constexpr ChunkConfig config = slice(Variant::config);
  static constexpr int kSlices = Variant::config.key_tile / config.key_tile;
};

/// What is summed over tokens or channels, and the diagonal of scale dO U^T.
template <class Variant>
struct ChunkSums {
  static constexpr int kSlices = KeysSlice<Variant>::kSlices, kChunk = ChunkShape<Variant>::kChunk;
  float diagonal[kChunk];
  float ddt_bias[ChunkShape<Variant>::kKeyTile];
  float dA_log[kSlices];            // of the channels of each slice
  float dots[kSlices][2 * kChunk];  // of q and dq, then k and dk, likewise: published by the keys kernel, zero at first

  KDA_DEVICE float dA_log_of_all() const {
    float sum = 0.f;
    for (float of_slice : dA_log) sum += of_slice;
    return sum;
  }
};

/// What lies over the record, from K~ on, once the values kernel has read that.
template <class Variant>
struct ChunkResults {
  ScoreGradients<Variant> scores;
  ChunkSums<Variant> sums;
};

template <class Variant>
struct BackwardCell {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Record = ChunkRecord<Variant>;
  /// S^T of 64 columns of V; a slice of it is one run of bytes.
  using State = tile::MatrixTile<E, kValueTile, Shape::kKeyTile, KeysSlice<Variant>::config.key_tile>;
  using Values = tile::MatrixTile<E, kValueTile, Shape::kChunk>;  // U^T of 64 columns of V
  static_assert(sizeof(Values) <= sizeof(typename Record::Values));
  /// The place of W in a record. In front of the first cell it is empty.
  static constexpr int64_t kFrontBytes = sizeof(typename Record::Wide);
  static_assert(kFrontBytes + sizeof(ChunkResults<Variant>) <= sizeof(Record));

  char* bytes;  // of the record
  int tiles;    // of V

  KDA_DEVICE BackwardCell(ChunkCall const& p, int64_t cell, int value_head)
      : bytes(ChunkRecordAt<Variant>(p, cell, value_head).bytes), tiles(value_tiles(p.value_dim)) {}

  static constexpr KDA_HOST_DEVICE int64_t inverse_offset(int tiles) {
    return int64_t(sizeof(Record)) + tiles * int64_t(sizeof(typename Record::Values));
  }
  static constexpr KDA_HOST_DEVICE int64_t states_offset(int tiles) {
    return inverse_offset(tiles) + int64_t(sizeof(ChunkInverse<Variant>));
  }
  /// From one cell to the next.
  static constexpr KDA_HOST_DEVICE int64_t size(int tiles) {
    return states_offset(tiles) + 2 * tiles * int64_t(sizeof(State)) - kFrontBytes;
  }

  KDA_DEVICE Record& record() const { return *reinterpret_cast<Record*>(bytes); }
  KDA_DEVICE ScoreGradients<Variant>& score_gradients() const { return results().scores; }
  KDA_DEVICE ChunkSums<Variant>& sums() const { return results().sums; }
  KDA_DEVICE Values& u(int tile) const {
    return *reinterpret_cast<Values*>(bytes + sizeof(Record) + tile * sizeof(typename Record::Values));
  }
  KDA_DEVICE ChunkInverse<Variant>& inverse() const {
    return *reinterpret_cast<ChunkInverse<Variant>*>(bytes + inverse_offset(tiles));
  }
  KDA_DEVICE State& state(int tile) const { return reinterpret_cast<State*>(bytes + states_offset(tiles))[tile]; }
  KDA_DEVICE State& d_state(int tile) const { return state(tiles + tile); }

 private:
  KDA_DEVICE ChunkResults<Variant>& results() const {
    return *reinterpret_cast<ChunkResults<Variant>*>(bytes + kFrontBytes);
  }
};

}  // namespace kda
