// The three products of a chain that keeps its left operands in registers, for one warp (mma.sync) or, started together
// and waited for later, for a warpgroup (wgmma). Same fragments, same shared tiles, same source above.
#pragma once
#include "tile/mma_tile.h"

namespace kda::tile {

/// Synchronous: every product is complete when its function returns. Each warp has its own 16 rows.
template <class E, int kRows, int kDepth>
struct MmaProducts {
  static constexpr int kWarps = 1;  // that must call together

  /// The left operand of start_rows until the next read; it may change afterwards.
  KDA_DEVICE void read(Accumulator const (&)[kDepth / 8]) {}
  /// x = left tile^T for the left [16 x kDepth] that was read, still unchanged, and a tile [kRows x kDepth]. Several
  /// pairs of x and tile at once: each piece of the left is an operand, which takes registers, only once.
  template <class... XAndTile>
  KDA_DEVICE void start_rows(Accumulator const (&left)[kDepth / 8], XAndTile&&... x) {
#pragma unroll
    for (int d = 0; d < kDepth; d += 16) add_rows(left_from<E>(left[d / 8], left[d / 8 + 1]), d, x...);
  }
  /// acc += left lower^T for a lower triangular [kRows x kRows] tile.
  template <class Tile>
  KDA_DEVICE void start_lower(Accumulator (&acc)[kRows / 8], LeftFragment<E> const (&left)[kRows / 16],
                              Tile const& lower) {
#pragma unroll
    for (int i = 0; i < kRows; i += 16)
#pragma unroll
      for (int c = i; c < kRows; c += 16)
        multiply<E>(acc[c / 8], acc[c / 8 + 1], left[i / 16], load_right<E>(lower, c, i));
  }
  /// acc += left tile for a tile of kRows rows.
  template <class Tile>
  KDA_DEVICE void start_outer(Accumulator (&acc)[Tile::kCols / 8], LeftFragment<E> const (&left)[kRows / 16],
                              Tile const& tile) {
#pragma unroll
    for (int c = 0; c < kRows; c += 16)
#pragma unroll
      for (int d = 0; d < Tile::kCols; d += 16) {
        if (kManyRegisters && d % 32 == 0) sync_warp();
        multiply<E>(acc[d / 8], acc[d / 8 + 1], left[c / 16], load_right_transposed<E>(tile, c, d));
      }
  }
  template <int kPending>
  KDA_DEVICE void wait() {}

 private:
  /// The state takes most registers: loads may not move up by more than two operands, of 16 registers each. They do not
  /// cross sync_warp.
  static constexpr bool kManyRegisters = sizeof(E) == 4 && kDepth > 64;
  KDA_DEVICE void add_rows(LeftFragment<E> const&, int) {}
  template <class Tile, class... More>
  KDA_DEVICE void add_rows(LeftFragment<E> const& a, int d, Accumulator (&x)[kRows / 8], Tile const& tile,
                           More&&... more) {
#pragma unroll
    for (int c = 0; c < kRows; c += 16) {
      if (d == 0) x[c / 8] = x[c / 8 + 1] = Accumulator{};
      multiply<E>(x[c / 8], x[c / 8 + 1], a, load_right<E>(tile, c, d));
    }
    add_rows(a, d, more...);
  }
};

/// Asynchronous: accumulators may be touched only after the wait. Each function is one group; the four warps of a
/// warpgroup call together, each with its own 16 of 64 rows. kRows = 64.
template <class E, int kRows, int kDepth>
struct WgmmaProducts {
  static_assert(kRows == 64 && (kDepth == 64 || kDepth == 128) && sizeof(E) == 2);
  static constexpr int kWarps = 4;
  LeftFragment<E> rows_left[kDepth / 16];  // must live until the products have read it

  KDA_DEVICE void read(Accumulator const (&left)[kDepth / 8]) {
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) rows_left[d] = left_from<E>(left[2 * d], left[2 * d + 1]);
  }
  KDA_DEVICE void start_rows(Accumulator const (&)[kDepth / 8]) {}
  template <class Tile, class... More>
  KDA_DEVICE void start_rows(Accumulator const (&left)[kDepth / 8], Accumulator (&x)[kRows / 8], Tile const& tile,
                             More&&... more) {
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
      int const at = d * 16 / Tile::kPanel * Tile::kPanel * kRows + d * 16 % Tile::kPanel;
      wgmma_m64k16<E, kRows, false>(x, rows_left[d].x, wgmma_descriptor(&tile.data[at], 0, 1024), d > 0);
    }
    wgmma_commit();
    start_rows(left, more...);
  }
  template <class Tile>
  KDA_DEVICE void start_lower(Accumulator (&acc)[kRows / 8], LeftFragment<E> const (&left)[kRows / 16],
                              Tile const& lower) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
      wgmma_m64k16<E, kRows, false>(acc, left[i].x, wgmma_descriptor(&lower.data[i * 16], 0, 1024), true);
    wgmma_commit();
  }
  template <class Tile>
  KDA_DEVICE void start_outer(Accumulator (&acc)[Tile::kCols / 8], LeftFragment<E> const (&left)[kRows / 16],
                              Tile const& tile) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
      wgmma_m64k16<E, Tile::kCols, true>(
          acc, left[i].x, wgmma_descriptor(&tile.data[i * 16 * Tile::kPanel], Tile::kPanelBytes, 1024), true);
    wgmma_commit();
  }
  template <int kPending>
  KDA_DEVICE void wait() {
    wgmma_wait<kPending>();
  }
};

}  // namespace kda::tile
