// Two neighbouring elements, moved and converted together.
#pragma once
#include "platform/platform.h"

namespace kda::tile {

template <class E>
struct PairOf {
  using Type = uint32_t;  // two 16-bit values, the first in the low half
};
template <>
struct PairOf<float> {
  using Type = float2;
};
template <class E>
using Pair = typename PairOf<E>::Type;

template <class E>
KDA_DEVICE float2 to_float2(Pair<E> x) {
  if constexpr (sizeof(E) == 4) return x;
  else return unpack2<E>(x);
}

template <class E>
KDA_DEVICE Pair<E> to_pair(float x, float y) {
  if constexpr (sizeof(E) == 4) return float2{x, y};
  else return pack2<E>(x, y);
}

template <class E>
KDA_DEVICE Pair<E> load_pair(E const* from) {
  return *reinterpret_cast<Pair<E> const*>(from);
}
template <class E>
KDA_DEVICE void store_pair(E* at, Pair<E> x) {
  *reinterpret_cast<Pair<E>*>(at) = x;
}

}  // namespace kda::tile
