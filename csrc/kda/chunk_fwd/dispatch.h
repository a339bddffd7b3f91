// Which variant of the chunkwise forward serves a call. Only for files compiled apart from the kernels.
#pragma once
#include <vector>

#include "kda/chunk/variants.h"
#include "kda/chunk_fwd/schedule.h"
#include "kda/select.h"

namespace kda {

/// Preferred first. KDA_HAS_SM90: the build includes code for compute capability 9.0a.
inline std::vector<ChunkFwdVariant> const& chunk_fwd_variants() {
  static std::vector<ChunkFwdVariant> const table = {
#if defined(KDA_HAS_SM90)
      describe_chunk_fwd<Bf16K64Sm90>(),  describe_chunk_fwd<Bf16K128Sm90>(), describe_chunk_fwd<Fp16K64Sm90>(),
      describe_chunk_fwd<Fp16K128Sm90>(),
#endif
      describe_chunk_fwd<Bf16K64>(),      describe_chunk_fwd<Bf16K64C32>(),   describe_chunk_fwd<Bf16K128>(),
      describe_chunk_fwd<Bf16K128C32>(),  describe_chunk_fwd<Bf16K256>(),     describe_chunk_fwd<Fp16K64>(),
      describe_chunk_fwd<Fp16K64C32>(),   describe_chunk_fwd<Fp16K128>(),     describe_chunk_fwd<Fp16K128C32>(),
      describe_chunk_fwd<Fp16K256>(),     describe_chunk_fwd<Fp32K64>(),      describe_chunk_fwd<Fp32K128>(),
      describe_chunk_fwd<Fp32K256>()};
  return table;
}

/// The first variant that the device can run, whose tile holds key_dim and whose chunk divides
/// `state_tokens`, the distance of kept states. Null: none.
inline ChunkFwdVariant const* select_chunk_fwd(Dtype dtype, int key_dim, int state_tokens, DeviceTraits const& device) {
  return first_variant(chunk_fwd_variants(), [&](ChunkFwdVariant const& variant) {
    return variant.dtype == dtype && variant.key_tile == key_tile_of(key_dim) && state_tokens % variant.chunk == 0 &&
           variant.shared_bytes() <= device.shared_limit && (device.has_wgmma || !variant.wgmma);
  });
}

}  // namespace kda
