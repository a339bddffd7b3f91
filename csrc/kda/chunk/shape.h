// The numbers that tell one chunkwise variant from another.
#pragma once
#include "platform/platform.h"

namespace kda {

/// A variant is a named struct with `Element` and `static constexpr ChunkConfig config`.
struct ChunkConfig {
  int chunk = 64;      // C, tokens per chunk: 16, 32 or 64
  int key_tile = 128;  // K rounded up to 64, 128 or 256; channels beyond key_dim are zero
  int stages = 2;      // records in shared memory at once
  bool wgmma = false;  // products by warpgroups (sm_90a; C = 64), else by warps
  int key_slices = 1;  // warps of the scan that share 16 columns of V: 2 have half of K each (C = 16)
};

inline constexpr int kTokensPerThread = 8;  // of one pair of key channels
inline constexpr int kTokensPerBlock = 16;  // that share an anchor, in their middle
inline constexpr int kValueTile = 64;       // columns of V per block of the scan
inline constexpr int kConsumerWarps = kValueTile / 16;
KDA_HOST_DEVICE int value_tiles(int value_dim) { return (value_dim + kValueTile - 1) / kValueTile; }

/// What a warp of the scan holds of S^T, or of M: rows from `row` on, of their `channels` those from `channel` on.
struct StateSlice {
  int row, channel, channels;
};

// fp32 states between rounds and segments (segments.h), rows [key_tile]: S^T; S^T, M and a flag per 64 rows of M.
KDA_HOST_DEVICE int64_t state_floats(int value_dim, int key_tile) {
  return int64_t(value_tiles(value_dim)) * kValueTile * key_tile;
}
KDA_HOST_DEVICE int64_t segment_floats(int value_dim, int key_tile) {
  return state_floats(value_dim, key_tile) + int64_t(key_tile) * key_tile + 4;
}

template <class Variant>
struct ChunkShape {
  static constexpr ChunkConfig kConfig = Variant::config;
  static constexpr int kChunk = kConfig.chunk;
  static constexpr int kKeyTile = kConfig.key_tile;
  static constexpr int kPairs = kKeyTile / 2;                // pairs of key channels
  static constexpr int kGroups = kChunk / kTokensPerThread;  // groups of 8 tokens
  static constexpr int kBlocks = kChunk / kTokensPerBlock;
  static constexpr int kColumnThreads = kPairs * kGroups;  // threads that hold a chunk in registers
  static constexpr int kWarpsPerGroup = kPairs / 32;
  static_assert(kPairs % 32 == 0 && kChunk % 16 == 0 && kChunk <= 64);
};

}  // namespace kda
