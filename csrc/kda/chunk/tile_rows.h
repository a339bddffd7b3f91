// Rows of q, k, v, g or o of one chunk, between global memory and a tile in shared memory.
#pragma once
#include "kda/chunk/gate_columns.h"
#include "platform/platform.h"

namespace kda {

/// The tokens of one chunk, one head, from one column on.
template <class E>
struct TileRows {
  static constexpr int kPiece = 16 / int(sizeof(E));
  E* base;  // of the tensor
  int64_t first, token_stride;
  int rows, columns;  // that exist
  bool aligned;       // 16 bytes can be moved at once

  /// `kColumns` columns of all rows from `column` on, zero where nothing exists; piece by piece over `count` threads.
  /// Asynchronous (cp.async) where pieces are aligned.
  template <int kColumns, class Tile>
  KDA_DEVICE void load(Tile& tile, int column, int index, int count) const {
    if (aligned && rows >= Tile::kRows && columns >= column + kColumns) {  // the usual case, in few instructions
      constexpr unsigned kPieces = kColumns / kPiece;
      unsigned const row0 = unsigned(index) / kPieces, col = column ^ unsigned(index) % kPieces * kPiece;
      E const* global = base + first + row0 * token_stride + col;
#pragma unroll
      for (unsigned row = 0; row < Tile::kRows; row += count / kPieces, global += count / kPieces * token_stride)
        if (Tile::kRows % (count / kPieces) == 0 || row0 + row < Tile::kRows)
          cp_async_16(&tile.at(row0 + row, col), global);
      return;
    }
    for_pieces<kColumns, Tile, 1>(column, index, count, [&](int row, int col, int live) {
      E* const shared = &tile.at(row, col);
      E const* const global = base + first + row * token_stride + col;
      if (aligned) {
        cp_async_16(shared, live > 0 ? global : base, live > 0 ? 16 : 0);
      } else {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) shared[i] = i < live ? global[i] : from_float<E>(0.f);
      }
    });
  }
  template <int kColumns, class Tile>
  KDA_DEVICE void store(Tile const& tile, int column, int index, int count) const {
    for_pieces<kColumns, Tile, 4>(column, index, count, [&](int row, int col, int live) {
      E const* const shared = &tile.at(row, col);
      E* const global = base + first + row * token_stride + col;
      if (aligned) {
        if (live > 0) *reinterpret_cast<uint4*>(global) = *reinterpret_cast<uint4 const*>(shared);
      } else {
#pragma unroll
        for (int i = 0; i < kPiece; ++i)
          if (i < live) global[i] = shared[i];
      }
    });
  }

 private:
  template <int kColumns, class Tile, int kUnroll, class F>
  KDA_DEVICE void for_pieces(int column, unsigned index, unsigned count, F f) const {
    constexpr unsigned kPieces = kColumns / kPiece;
#pragma unroll kUnroll
    for (unsigned i = 0; i < Tile::kRows * kPieces; i += count) {
      if (Tile::kRows * kPieces % count && i + index >= Tile::kRows * kPieces) return;
      int const row = (i + index) / kPieces, col = column + (i + index) % kPieces * kPiece;
      int const live = row < rows ? columns - col : 0;
      f(row, col, live < kPiece ? live : kPiece);
    }
  }
};

/// `columns`: that exist from `column` on.
template <class E>
KDA_DEVICE TileRows<E> tile_rows(Rows const& x, ChunkOfHead const& chunk, int head, int column, int columns) {
  RowStrides const& s = x.strides;
  int64_t const first = chunk.batch_row * s.batch + chunk.begin * s.token + head * s.head + column;
  return {static_cast<E*>(x.data), first, s.token, chunk.rows, columns, x.in_pieces};
}

}  // namespace kda
