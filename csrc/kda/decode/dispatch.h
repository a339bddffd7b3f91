// The C API: kda::decode(params, stream). Only for files compiled apart from the kernels.
#pragma once
#include "kda/decode/launch.h"
#include "kda/select.h"

namespace kda {

inline int64_t state_element_bytes(DecodeParams const& p) { return p.state_dtype == Dtype::kFloat32 ? 4 : 2; }

/// Whether both pools can be moved 16 bytes at a time, anywhere; never where trees are, which have fewer kernels.
inline bool states_in_pieces(DecodeParams const& p) {
  int64_t const piece = 16 / state_element_bytes(p);
  bool pieces = !p.parents.data && (p.value_first ? p.key_dim == key_tile_of(p.key_dim) : p.value_dim % piece == 0);
  for (StatePool const* pool : {&p.state, &p.new_state})
    if (pool->data)
      pieces = pieces && reinterpret_cast<uintptr_t>(pool->data) % 16 == 0 && pool->slot_stride % piece == 0;
  return pieces;
}

/// The variant of a table for the states of `p`. Null: there is nothing to do.
template <class Variant>
Variant const* select_for_states(std::vector<Variant> const& table, DecodeParams const& p) {
  if (p.sequences == 0 || p.value_dim == 0) return nullptr;
  return first_variant(table, [&](Variant const& variant) {
    return variant.key_tile == key_tile_of(p.key_dim) && variant.state_bytes == state_element_bytes(p);
  });
}

inline std::vector<DecodeVariant> const& decode_variants() {
  static std::vector<DecodeVariant> const table = {
      describe_decode<DecodeTile<float, 64>>(),  describe_decode<DecodeTile<Bits16, 64>>(),
      describe_decode<DecodeTile<float, 128>>(), describe_decode<DecodeTile<Bits16, 128>>(),
      describe_decode<DecodeTile<float, 256>>(), describe_decode<DecodeTile<Bits16, 256>>()};
  return table;
}
inline DecodeVariant const* select_decode(DecodeParams const& p) { return select_for_states(decode_variants(), p); }

/// Launches on `stream`. All pointers are of the current device; nothing is allocated, and nothing synchronises.
inline void decode(DecodeParams const& p, cudaStream_t stream) {
  if (DecodeVariant const* const variant = select_decode(p)) variant->steps(p, states_in_pieces(p), stream);
}
/// The same for the accepted tokens of earlier drafts.
inline void decode_commit(DecodeCommitParams const& p, cudaStream_t stream) {
  if (DecodeVariant const* const variant = select_decode(p)) variant->commit(p, states_in_pieces(p), stream);
}

}  // namespace kda
