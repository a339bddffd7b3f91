// The numbers of the decoding kernels, all from one rule: a thread holds 128 bytes of the state, or as many as the
// lanes of its rows can sum (32 elements of K = 64), which it loads at once. That leaves room for enough blocks per SM
// that 60 to 80 KB are on their way, and a token is prepared once for as many values as possible.
#pragma once
#include "kda/decode/params.h"
#include "platform/platform.h"

namespace kda {

inline constexpr int kStateElements = 32;  // per thread; twice as many of 16 bits where a row has lanes for their sums
/// Blocks that the registers of an SM must suffice for, with so many a thread that nothing spills.
constexpr int blocks_per_sm(int threads, int registers) {
  int const blocks = 64 * 1024 / registers / threads;
  return blocks ? blocks : 1;
}
inline constexpr int kStagedTokens = 4;  // whose inputs are on their way, and then in shared memory, at once

/// States [V, K]: a row of K lies across the lanes, a warp holds whole rows.
template <class StateElement, int kTileOfK, bool kInPieces, int kBlockWarps = 4>
struct ValueFirstShape {
  using State = StateElement;
  static constexpr bool kValueFirst = true;
  static constexpr bool kVector = kInPieces;            // K is exactly kKeyTile and rows are aligned: 16 bytes at once
  static constexpr int kKeyTile = kTileOfK;             // K rounded up to 64, 128 or 256
  static constexpr int kElements = 16 / sizeof(State);  // of a piece of 16 bytes
  static constexpr int kPieces = (sizeof(State) == 2 && kKeyTile >= 128 ? 2 : 1) * kStateElements / kElements;
  static constexpr int kLanesPerRow = kKeyTile / kElements < 32 ? kKeyTile / kElements : 32;
  static constexpr int kPiecesPerRow = kKeyTile / kElements / kLanesPerRow;  // of one lane
  static constexpr int kRows = kPieces / kPiecesPerRow;                      // of one lane
  static constexpr int kRowsAtOnce = 32 / kLanesPerRow;                      // in one load of the warp
  static constexpr int kRowsPerWarp = kRows * kRowsAtOnce;
  static constexpr int kWarps = kBlockWarps, kThreads = 32 * kWarps;
  static constexpr int kRegisters =
      (kVector ? 96 : 160) + (kPieces * kElements > kStateElements ? 32 : 0) + (kKeyTile == 256 ? 40 : 0);
  static constexpr int kBlocksPerSM = blocks_per_sm(kThreads, kRegisters);
  static constexpr int kValueTile = kWarps * kRowsPerWarp;
};

/// States [K, V]: four or eight lanes hold 64 or 128 bytes of a row of V, a thread kRows consecutive rows of K.
template <class StateElement, int kTileOfK, bool kInPieces>
struct KeyFirstShape {
  using State = StateElement;
  static constexpr bool kValueFirst = false;
  static constexpr bool kVector = kInPieces;  // V is a multiple of a piece and rows are aligned
  static constexpr int kKeyTile = kTileOfK;
  static constexpr int kElements = 16 / sizeof(State);  // of a piece of 16 bytes
  static constexpr int kPieces = kStateElements / kElements;
  static constexpr int kLanesPerRow = kPieces * 32 < kKeyTile ? 4 : 8;  // at most 256 threads
  static constexpr int kRows = kPieces;                                 // of one lane
  static constexpr int kKeysPerWarp = kRows * (32 / kLanesPerRow);
  static constexpr int kWarps = kKeyTile / kKeysPerWarp, kThreads = 32 * kWarps,
                       kBlocksPerSM = blocks_per_sm(kThreads, 168);
  static constexpr int kValueTile = kLanesPerRow * kElements;
};

}  // namespace kda
