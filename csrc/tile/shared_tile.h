// A matrix in shared memory, swizzled so that every access pattern of the products is free of bank conflicts.
#pragma once
#include "platform/platform.h"

namespace kda::tile {

/// kRows x kCols in panels of at most 128 bytes of columns; within a panel row-major in pieces of 16 bytes, the piece
/// index xor-ed with the row, so that the same column of eight consecutive rows lies in eight different groups of four
/// banks. A panel of 128-byte rows is what TMA and wgmma call the 128B swizzle (hence the alignment to 1024 bytes).
template <class T, int kRowCount, int kColCount>
struct alignas(1024) SharedTile {
  using Element = T;
  static constexpr int kRows = kRowCount;
  static constexpr int kCols = kColCount;
  static constexpr int kPiece = 16 / int(sizeof(T));                      // elements of one piece
  static constexpr int kPanel = kCols < 8 * kPiece ? kCols : 8 * kPiece;  // columns of one panel
  static constexpr int kPieces = kPanel / kPiece;                         // pieces of one row of a panel
  static constexpr int kRowsPerLine = 8 / kPieces;                        // rows that share the 32 banks
  static constexpr int kPanelBytes = kRows * kPanel * int(sizeof(T));
  static_assert(kCols % kPanel == 0 && (kPieces & (kPieces - 1)) == 0, "a row is 2^n pieces of 16 bytes");

  T data[kRows * kCols];

  /// In bytes, and exclusive or of whole columns: the compiler then folds what is constant, where constant rows are
  /// multiples of eight and callers write `constant ^ rest` for columns that share no bit.
  static KDA_DEVICE constexpr uint32_t offset(uint32_t row, uint32_t col) {
    constexpr uint32_t kSize = sizeof(T);
    return (col / kPanel * kRows + row) * (kPanel * kSize) +
           ((col * kSize ^ row / kRowsPerLine % kPieces * 16) % (kPanel * kSize));
  }
  KDA_DEVICE T& at(uint32_t row, uint32_t col) {
    return *reinterpret_cast<T*>(reinterpret_cast<char*>(data) + offset(row, col));
  }
  /// kCount columns from `first` on, as a tile: panels lie one behind the other.
  template <int kCount>
  KDA_DEVICE SharedTile<T, kRows, kCount> const& columns(int first) const {
    static_assert(kCount % kPanel == 0);
    return reinterpret_cast<SharedTile<T, kRows, kCount> const&>(data[first * kRows]);
  }
  KDA_DEVICE T const& at(uint32_t row, uint32_t col) const {
    return *reinterpret_cast<T const*>(reinterpret_cast<char const*>(data) + offset(row, col));
  }
};

/// A matrix as 8 x 8 matrices, each of them one run of bytes in rows, in panels of kPanelCols columns. Accumulators are
/// written to it in whole lines, and ldmatrix reads it without bank conflicts.
template <class T, int kRowCount, int kColCount, int kPanelCols = kColCount>
struct alignas(128) MatrixTile {
  using Element = T;
  static constexpr int kRows = kRowCount;
  static constexpr int kCols = kColCount;
  static constexpr int kPanel = kPanelCols;
  static_assert(kRows % 8 == 0 && kCols % kPanel == 0 && kPanel % 8 == 0);

  T data[kRows * kCols];

  static KDA_DEVICE constexpr uint32_t index(uint32_t row, uint32_t col) {
    return ((col / kPanel * (kRows / 8) + row / 8) * (kPanel / 8) + col % kPanel / 8) * 64 + row % 8 * 8 + col % 8;
  }
  /// The panel that begins with column `first`, as a tile.
  KDA_DEVICE MatrixTile<T, kRows, kPanel>& panel(int first) {
    return reinterpret_cast<MatrixTile<T, kRows, kPanel>&>(data[first * kRows]);
  }
  KDA_DEVICE T& at(uint32_t row, uint32_t col) { return data[index(row, col)]; }
  KDA_DEVICE T const& at(uint32_t row, uint32_t col) const { return data[index(row, col)]; }
};

}  // namespace kda::tile
