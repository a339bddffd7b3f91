// Which variant of the chunkwise backward serves a call. Only for files compiled apart from the kernels.
#pragma once
#include <vector>

#include "kda/chunk/variants.h"
#include "kda/chunk_bwd/launch.h"
#include "kda/select.h"

namespace kda {

/// Preferred first, as the forward's.
inline std::vector<ChunkBwdVariant> const& chunk_bwd_variants() {
  static std::vector<ChunkBwdVariant> const table = {
#if defined(KDA_HAS_SM90)
      describe_chunk_bwd<Bf16K64Sm90>(),  describe_chunk_bwd<Bf16K128Sm90>(), describe_chunk_bwd<Fp16K64Sm90>(),
      describe_chunk_bwd<Fp16K128Sm90>(),
#endif
      describe_chunk_bwd<Bf16K64>(),      describe_chunk_bwd<Bf16K128>(),     describe_chunk_bwd<Bf16K128C32>(),
      describe_chunk_bwd<Bf16K256>(),     describe_chunk_bwd<Fp16K64>(),      describe_chunk_bwd<Fp16K128>(),
      describe_chunk_bwd<Fp16K128C32>(),  describe_chunk_bwd<Fp16K256>(),     describe_chunk_bwd<Fp32K64>(),
      describe_chunk_bwd<Fp32K128>(),     describe_chunk_bwd<Fp32K256>()};
  return table;
}

/// The first variant that the device can run. Null: none.
inline ChunkBwdVariant const* select_chunk_bwd(Dtype dtype, int key_dim, DeviceTraits const& device) {
  return first_variant(chunk_bwd_variants(), [&](ChunkBwdVariant const& variant) {
    return variant.dtype == dtype && variant.key_tile == key_tile_of(key_dim) &&
           variant.shared_bytes() <= device.shared_limit && (device.has_wgmma || !variant.wgmma);
  });
}

}  // namespace kda
