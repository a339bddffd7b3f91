// Which variant of the chunkwise forward serves a call. Only for files compiled apart from the kernels.
#pragma once
#include "kda/chunk_fwd/launch.h"
#include "kda/chunk_fwd/variants.h"

namespace kda {

/// Preferred first.
inline ChunkFwdVariant const (&chunk_fwd_variants())[11] {
  static ChunkFwdVariant const table[11] = {
      describe_chunk_fwd<Bf16K64>(),     describe_chunk_fwd<Bf16K128>(), describe_chunk_fwd<Bf16K128C32>(),
      describe_chunk_fwd<Bf16K256>(),    describe_chunk_fwd<Fp16K64>(),  describe_chunk_fwd<Fp16K128>(),
      describe_chunk_fwd<Fp16K128C32>(), describe_chunk_fwd<Fp16K256>(), describe_chunk_fwd<Fp32K64>(),
      describe_chunk_fwd<Fp32K128>(),    describe_chunk_fwd<Fp32K256>()};
  return table;
}

/// The first variant whose tile holds key_dim (and is not twice too wide), whose chunk divides `state_tokens` (the
/// distance of kept states) and whose blocks fit `shared_limit` bytes of shared memory. Null: none.
inline ChunkFwdVariant const* select_chunk_fwd(Dtype dtype, int key_dim, int state_tokens, size_t shared_limit) {
  int const key_tile = key_dim <= 64 ? 64 : key_dim <= 128 ? 128 : 256;
  for (ChunkFwdVariant const& variant : chunk_fwd_variants())
    if (variant.dtype == dtype && variant.key_tile == key_tile && state_tokens % variant.chunk == 0 &&
        variant.shared_bytes() <= shared_limit)
      return &variant;
  return nullptr;
}

}  // namespace kda
