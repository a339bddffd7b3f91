// Exchange between the 32 lanes of a warp. Shuffles order nothing in memory.
#pragma once
#include "platform/macros.h"

namespace kda {

#if defined(KDA_EMULATE)
namespace emulator {
template <class T>
struct Shuffle {
  T value, result;
  int source;
};
template <class T>
KDA_NO_TSAN void exchange_shuffle(Shuffle<T>** lanes, uint32_t) {
  for (int l = 0; l < 32; ++l) lanes[l]->result = lanes[lanes[l]->source]->value;
}
template <class T>
T exchange_with(int source, T value, char const* operation, Location where) {
  Shuffle<T> s{value, value, source & 31};
  Engine::current().warp_collective<Shuffle<T>>(operation, ~0u, &s, exchange_shuffle<T>, where);
  return s.result;
}
}  // namespace emulator
#endif

/// The value of lane `source`. All lanes. PTX: shfl.sync.idx.b32
template <class T>
KDA_DEVICE T shuffle(T value, int source KDA_WHERE) {
#if defined(KDA_EMULATE)
  return emulator::exchange_with(source, value, "shuffle", where);
#else
  return __shfl_sync(~0u, value, source);
#endif
}

/// The value of the lane whose index differs by `bits`. All lanes. PTX: shfl.sync.bfly.b32
template <class T>
KDA_DEVICE T shuffle_xor(T value, int bits KDA_WHERE) {
#if defined(KDA_EMULATE)
  return emulator::exchange_with(lane_index() ^ bits, value, "shuffle_xor", where);
#else
  return __shfl_xor_sync(~0u, value, bits);
#endif
}

/// Whether any lane says so. All lanes. PTX: vote.sync.any.pred
KDA_DEVICE bool warp_any(bool x KDA_WHERE) {
#if defined(KDA_EMULATE)
  int any = x;
  for (int bits = 16; bits; bits /= 2) any |= shuffle_xor(any, bits, where);
  return any;
#else
  return __any_sync(~0u, x);
#endif
}

/// How many lanes from the first on say so. All lanes. PTX: vote.sync.ballot.b32
KDA_DEVICE int warp_count_leading(bool x KDA_WHERE) {
#if defined(KDA_EMULATE)
  uint32_t said = uint32_t(x) << lane_index();
  for (int bits = 16; bits; bits /= 2) said |= shuffle_xor(said, bits, where);
  return ~said ? __builtin_ctz(~said) : 32;
#else
  return __clz(__brev(~__ballot_sync(~0u, x)));
#endif
}

/// The sum over all lanes, the same bits in every lane.
template <class T>
KDA_DEVICE T warp_sum(T x KDA_WHERE) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) {
#if defined(KDA_EMULATE)
    x += shuffle_xor(x, bits, where);
#else
    x += shuffle_xor(x, bits);
#endif
  }
  return x;
}

/// Sums kCount (a power of two) values over groups of kCount lanes, kStride apart; lane l gets the sum of
/// x[l / kStride % kCount]. kCount - 1 shuffles, where one by one it would take kCount log2(kCount).
template <int kCount, int kStride = 1>
KDA_DEVICE float group_sum_scattered(float const (&x)[kCount]) {
  static_assert(kCount >= 1 && kCount * kStride <= 32 && (kCount & (kCount - 1)) == 0);
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    bool const upper = lane_index() & kHalf * kStride;
    float y[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      float const keep = upper ? x[i + kHalf] : x[i], give = upper ? x[i] : x[i + kHalf];
      y[i] = keep + shuffle_xor(give, kHalf * kStride);
    }
    return group_sum_scattered<kHalf, kStride>(y);
  } else {
    return x[0];
  }
}

/// The same over all lanes of the warp.
template <int kCount>
KDA_DEVICE float warp_sum_scattered(float const (&x)[kCount]) {
  float sum = group_sum_scattered(x);
#pragma unroll
  for (int bits = kCount; bits < 32; bits *= 2) sum += shuffle_xor(sum, bits);
  return sum;
}

}  // namespace kda
