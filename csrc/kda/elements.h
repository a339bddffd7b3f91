// Elements whose type only the parameters know, and neighbours that move at once.
#pragma once
#include "kda/dtype.h"
#include "platform/memory.h"

namespace kda {

KDA_DEVICE float load_float(void const* from, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<float const*>(from)[i];
  if (dtype == Dtype::kBfloat16) return to_float(static_cast<Bf16 const*>(from)[i]);
  return to_float(static_cast<Fp16 const*>(from)[i]);
}
KDA_DEVICE void store_float(void* to, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::kFloat32) static_cast<float*>(to)[i] = x;
  else if (dtype == Dtype::kBfloat16) static_cast<Bf16*>(to)[i] = from_float<Bf16>(x);
  else static_cast<Fp16*>(to)[i] = from_float<Fp16>(x);
}

/// Calls f(from) with the type that `from` points to, so that one branch stands before all loads of f.
template <class F>
KDA_DEVICE void with_elements(void const* from, Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) f(static_cast<float const*>(from));
  else if (dtype == Dtype::kBfloat16) f(static_cast<Bf16 const*>(from));
  else f(static_cast<Fp16 const*>(from));
}

/// The 32-bit words of a piece.
KDA_DEVICE void words_of(uint4 bits, uint32_t (&words)[4]) {
  words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
}
KDA_DEVICE void words_of(uint2 bits, uint32_t (&words)[2]) { words[0] = bits.x, words[1] = bits.y; }
KDA_DEVICE void words_of(uint32_t bits, uint32_t (&words)[1]) { words[0] = bits; }
KDA_DEVICE void words_of(uint16_t bits, uint32_t (&words)[1]) { words[0] = bits; }
KDA_DEVICE void set_words(uint4& bits, uint32_t const (&words)[4]) { bits = {words[0], words[1], words[2], words[3]}; }
KDA_DEVICE void set_words(uint2& bits, uint32_t const (&words)[2]) { bits = {words[0], words[1]}; }
KDA_DEVICE void set_words(uint32_t& bits, uint32_t const (&words)[1]) { bits = words[0]; }
KDA_DEVICE void set_words(uint16_t& bits, uint32_t const (&words)[1]) { bits = uint16_t(words[0]); }

/// kCount neighbours of a row as they lie in memory: 16, 8, 4 or 2 bytes that one access moves.
template <class E, int kCount>
struct Piece {
  static constexpr int kBytes = kCount * int(sizeof(E)), kWords = kBytes < 4 ? 1 : kBytes / 4;
  using Bits =
      std::conditional_t<kBytes == 16, uint4,
                         std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  static_assert(sizeof(Bits) == kBytes);
  Bits bits;

  KDA_DEVICE void load(E const* from) { bits = *reinterpret_cast<Bits const*>(from); }
  KDA_DEVICE void store(E* to) const { store_whole(reinterpret_cast<Bits*>(to), bits); }

  KDA_DEVICE void unpack(float* x) const {
    uint32_t words[kWords];
    words_of(bits, words);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(E) == 4) {
        x[i] = bits_to_float(words[i]);
      } else {
        float2 const pair = unpack2<E>(words[i]);
        x[2 * i] = pair.x;
        if constexpr (kCount > 1) x[2 * i + 1] = pair.y;
      }
    }
  }
  KDA_DEVICE void pack(float const* x) {
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(E) == 4) words[i] = float_to_bits(x[i]);
      else words[i] = pack2<E>(x[2 * i], kCount > 1 ? x[2 * i + (kCount > 1)] : 0.f);
    }
    set_words(bits, words);
  }
};

}  // namespace kda
