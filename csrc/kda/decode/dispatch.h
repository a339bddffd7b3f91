// The C API: kda::decode(params, stream). Only for files compiled apart from the kernels.
#pragma once
#include "kda/decode/launch.h"
#include "kda/errors.h"

namespace kda {

inline int64_t state_element_bytes(DecodeParams const& p) { return p.state_dtype == Dtype::kFloat32 ? 4 : 2; }

/// Whether both pools can be moved 16 bytes at a time, anywhere; never where trees are, which have fewer kernels.
inline bool states_in_pieces(DecodeParams const& p, int key_tile) {
  int64_t const piece = 16 / state_element_bytes(p);
  bool pieces = !p.parents.data && (p.value_first ? p.key_dim == key_tile : p.value_dim % piece == 0);
  for (StatePool const* pool : {&p.state, &p.new_state})
    if (pool->data)
      pieces = pieces && reinterpret_cast<uintptr_t>(pool->data) % 16 == 0 && pool->slot_stride % piece == 0;
  return pieces;
}

inline int decode_key_tile(int key_dim) { return key_dim <= 64 ? 64 : key_dim <= 128 ? 128 : 256; }

/// Calls f(launcher) with each variant.
template <class F>
void for_each_decode_variant(F f) {
  f(DecodeLauncher<DecodeVariant<float, 64>>{}), f(DecodeLauncher<DecodeVariant<Bits16, 64>>{});
  f(DecodeLauncher<DecodeVariant<float, 128>>{}), f(DecodeLauncher<DecodeVariant<Bits16, 128>>{});
  f(DecodeLauncher<DecodeVariant<float, 256>>{}), f(DecodeLauncher<DecodeVariant<Bits16, 256>>{});
}

/// Calls f(launcher, whether states move in pieces) with the variant that serves `p`.
template <class F>
void with_decode_variant(DecodeParams const& p, F f) {
  if (p.sequences == 0 || p.value_dim == 0) return;
  int const key_tile = decode_key_tile(p.key_dim);
  bool const pieces = states_in_pieces(p, key_tile);
  for_each_decode_variant([&](auto launcher) {
    using Variant = typename decltype(launcher)::ServedVariant;
    if (Variant::kKeyTile == key_tile && int64_t(sizeof(typename Variant::State)) == state_element_bytes(p))
      f(launcher, pieces);
  });
}

/// Launches on `stream`. All pointers are of the current device; nothing is allocated, and nothing synchronises.
inline void decode(DecodeParams const& p, cudaStream_t stream) {
  with_decode_variant(p, [&](auto launcher, bool pieces) { launcher.steps(p, pieces, stream); });
}
/// The same for the accepted tokens of earlier drafts.
inline void decode_commit(DecodeCommitParams const& p, cudaStream_t stream) {
  with_decode_variant(p, [&](auto launcher, bool pieces) { launcher.commit(p, pieces, stream); });
}

/// One token of a whole layer. States are [value_dim, key_dim].
inline void decode_layer(DecodeLayerParams const& p, cudaStream_t stream) {
  with_decode_variant(p.step, [&](auto launcher, bool pieces) { launcher.layer(p, pieces, stream); });
}

}  // namespace kda
