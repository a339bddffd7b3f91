#include "kda/decode/launch_variant.h"

namespace kda {
template <>
void launch_decode<DecodeFp32K256>(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  launch_decode_layout<float, 256>(p, in_pieces, stream);
}
}  // namespace kda
