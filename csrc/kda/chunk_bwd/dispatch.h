// Which variant of the chunkwise backward serves a call. Only for files compiled apart from the kernels.
#pragma once
#include "kda/chunk_bwd/launch.h"
#include "kda/chunk_fwd/dispatch.h"

namespace kda {

/// Preferred first, as the forward's.
inline std::vector<ChunkBwdVariant> const& chunk_bwd_variants() {
  static std::vector<ChunkBwdVariant> const table = {
#if defined(KDA_HAS_SM90)
      describe_chunk_bwd<Bf16K64Sm90>(),  describe_chunk_bwd<Bf16K128Sm90>(), describe_chunk_bwd<Fp16K64Sm90>(),
      describe_chunk_bwd<Fp16K128Sm90>(),
#endif
      describe_chunk_bwd<Bf16K64>(),      describe_chunk_bwd<Bf16K64C32>(),   describe_chunk_bwd<Bf16K128>(),
      describe_chunk_bwd<Bf16K128C32>(),  describe_chunk_bwd<Bf16K256>(),     describe_chunk_bwd<Fp16K64>(),
      describe_chunk_bwd<Fp16K64C32>(),   describe_chunk_bwd<Fp16K128>(),     describe_chunk_bwd<Fp16K128C32>(),
      describe_chunk_bwd<Fp16K256>(),     describe_chunk_bwd<Fp32K64>(),      describe_chunk_bwd<Fp32K128>(),
      describe_chunk_bwd<Fp32K256>()};
  return table;
}

struct ChunkBwdChoice {
  ChunkBwdVariant const* backward = nullptr;
  ChunkFwdVariant const* forward = nullptr;  // whose prepare kernel it launches
};

/// The first variant that the device can run. Null: none.
inline ChunkBwdChoice select_chunk_bwd(Dtype dtype, int key_dim, DeviceTraits device) {
  int const key_tile = key_dim <= 64 ? 64 : key_dim <= 128 ? 128 : 256;
  for (ChunkBwdVariant const& variant : chunk_bwd_variants()) {
    if (variant.dtype != dtype || variant.key_tile != key_tile || (variant.wgmma && !device.has_wgmma)) continue;
    for (ChunkFwdVariant const& forward : chunk_fwd_variants())
      if (std::string(forward.name) == variant.name &&
          std::max(variant.shared_bytes, forward.prepare_shared_bytes) <= device.shared_limit)
        return {&variant, &forward};
  }
  return {};
}

}  // namespace kda
