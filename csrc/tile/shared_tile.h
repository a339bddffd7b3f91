// A matrix in shared memory, swizzled so that every access pattern of mma_tile.h is free of bank conflicts.
#pragma once
#include "platform/platform.h"

namespace kda::tile {

/// kRows x kCols, row-major in pieces of 16 bytes; the piece index is xor-ed with the row, so that the same column
/// of eight consecutive rows lies in eight different groups of four banks.
template <class T, int kRowCount, int kColCount>
struct alignas(128) SharedTile {
  using Element = T;
  static constexpr int kRows = kRowCount;
  static constexpr int kCols = kColCount;
  static constexpr int kPiece = 16 / int(sizeof(T));                   // elements of one piece
  static constexpr int kPieces = kCols / kPiece;                       // pieces of one row
  static constexpr int kRowsPerLine = kPieces >= 8 ? 1 : 8 / kPieces;  // rows that share the 32 banks
  static constexpr int kXorMask = (kPieces >= 8 ? 8 : kPieces) - 1;
  static_assert(kCols % kPiece == 0 && (kPieces & (kPieces - 1)) == 0, "a row is 2^n pieces of 16 bytes");

  T data[kRows * kCols];

  static KDA_DEVICE constexpr int index(int row, int col) {
    int const piece = (col / kPiece) ^ ((row / kRowsPerLine) & kXorMask);
    return row * kCols + piece * kPiece + col % kPiece;
  }
  KDA_DEVICE T& at(int row, int col) { return data[index(row, col)]; }
  KDA_DEVICE T const& at(int row, int col) const { return data[index(row, col)]; }
};

}  // namespace kda::tile
