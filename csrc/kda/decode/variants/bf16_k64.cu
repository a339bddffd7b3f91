#include "kda/decode/launch_variant.h"

namespace kda {
template <>
void launch_decode<DecodeBf16K64>(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  launch_decode_layout<Bf16, 64>(p, in_pieces, stream);
}
}  // namespace kda
