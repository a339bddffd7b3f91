// What the host knows of one compiled variant of decode_layer.
#pragma once
#include "kda/decode/launch.h"
#include "kda/decode_layer/params.h"

namespace kda {

/// `in_pieces`: the states can be moved 16 bytes at a time.
struct DecodeLayerVariant {
  int state_bytes, key_tile;
  DecodePlan (*plan)(DecodeParams const&, bool in_pieces);
  std::vector<KernelLaunch> (*kernels)();
  void (*launch)(DecodeLayerParams const&, bool in_pieces, cudaStream_t);
};

/// Instantiated by the file of each variant.
template <class Tile>
DecodeLayerVariant describe_decode_layer();

}  // namespace kda
