// What the host knows of one compiled variant of decode and decode_commit.
#pragma once
#include <vector>

#include "kda/decode/params.h"
#include "platform/launch.h"

namespace kda {

/// What a variant of the decoding kernels is compiled for: an element of the states, a tile of K.
template <class StateElement, int kTileOfK>
struct DecodeTile {
  using State = StateElement;
  static constexpr int kKeyTile = kTileOfK;
};

/// How a call is launched.
struct DecodePlan {
  int64_t blocks;
  int32_t threads, value_tile;  // values per block
  size_t shared_bytes;
};
inline dim3 grid_of(DecodePlan const& plan) { return dim3(unsigned(plan.blocks)); }

/// `in_pieces`: the states can be moved 16 bytes at a time.
struct DecodeVariant {
  int state_bytes, key_tile;
  DecodePlan (*plan)(DecodeParams const&, bool in_pieces);
  std::vector<KernelLaunch> (*kernels)();  // as they are launched where a sequence has several tokens
  void (*steps)(DecodeParams const&, bool in_pieces, cudaStream_t);
  void (*commit)(DecodeCommitParams const&, bool in_pieces, cudaStream_t);
};

/// Instantiated by the file of each variant.
template <class Tile>
DecodeVariant describe_decode();

}  // namespace kda
