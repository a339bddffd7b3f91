// The C API: kda::decode_layer(params, stream). Only for files compiled apart from the kernels.
#pragma once
#include "kda/decode/dispatch.h"
#include "kda/decode_layer/launch.h"

namespace kda {

inline std::vector<DecodeLayerVariant> const& decode_layer_variants() {
  static std::vector<DecodeLayerVariant> const table = {
      describe_decode_layer<DecodeTile<float, 64>>(),  describe_decode_layer<DecodeTile<Bits16, 64>>(),
      describe_decode_layer<DecodeTile<float, 128>>(), describe_decode_layer<DecodeTile<Bits16, 128>>(),
      describe_decode_layer<DecodeTile<float, 256>>(), describe_decode_layer<DecodeTile<Bits16, 256>>()};
  return table;
}
/// `step`: that of the layer's one token.
inline DecodeLayerVariant const* select_decode_layer(DecodeParams const& step) {
  return select_for_states(decode_layer_variants(), step);
}

/// One token of a whole layer, on `stream`. States are [value_dim, key_dim].
inline void decode_layer(DecodeLayerParams const& p, cudaStream_t stream) {
  if (DecodeLayerVariant const* const variant = select_decode_layer(p.step))
    variant->launch(p, states_in_pieces(p.step), stream);
}

}  // namespace kda
