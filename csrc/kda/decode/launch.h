// What the host calls. A variant is a file in variants/: the dtype of the state and the tile of K.
#pragma once
#include <vector>

#include "kda/decode/layer_params.h"
#include "platform/launch.h"

namespace kda {

template <class StateElement, int kTileOfK>
struct DecodeVariant {
  using State = StateElement;
  static constexpr int kKeyTile = kTileOfK;
};

/// How a call is launched.
struct DecodePlan {
  int64_t blocks;
  int32_t threads, value_tile;  // values per block
  size_t shared_bytes;
};

/// `in_pieces`: the states can be moved 16 bytes at a time. Instantiated in variants/ alone.
template <class Variant>
struct DecodeLauncher {
  using ServedVariant = Variant;
  static void steps(DecodeParams const& p, bool in_pieces, cudaStream_t stream);
  static void commit(DecodeCommitParams const& p, bool in_pieces, cudaStream_t stream);
  static void layer(DecodeLayerParams const& p, bool in_pieces, cudaStream_t stream);
  /// Of steps and commit, and of layer.
  static DecodePlan plan(DecodeParams const& p, bool in_pieces);
  static DecodePlan layer_plan(DecodeParams const& p, bool in_pieces);
  /// As they are launched where a sequence has several tokens.
  static std::vector<KernelLaunch> kernels();
};

}  // namespace kda
