// Element types and their conversions.
#pragma once
#include "platform/macros.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

namespace kda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

KDA_HOST_DEVICE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}
KDA_HOST_DEVICE uint32_t float_to_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

KDA_HOST_DEVICE float to_float(float x) { return x; }
KDA_HOST_DEVICE float to_float(Bf16 x) { return __bfloat162float(x); }
KDA_HOST_DEVICE float to_float(Fp16 x) { return __half2float(x); }

/// Round to nearest even.
template <class E>
KDA_HOST_DEVICE E from_float(float x) {
  if constexpr (std::is_same_v<E, float>) return x;
  else if constexpr (std::is_same_v<E, Bf16>) return __float2bfloat16(x);
  else return __float2half(x);
}

/// Two elements in 32 bits, x in the low half. PTX: cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32
template <class E>
KDA_DEVICE uint32_t pack2(float x, float y) {
#if defined(KDA_EMULATE)
  E const pair[2] = {from_float<E>(x), from_float<E>(y)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
#else
  uint32_t bits;
  if constexpr (std::is_same_v<E, Bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
#endif
}
template <class E>
KDA_DEVICE float2 unpack2(uint32_t bits) {
  if constexpr (std::is_same_v<E, Bf16>) {
    return {bits_to_float(bits << 16), bits_to_float(bits & 0xFFFF0000u)};
  } else {
    uint16_t const half[2] = {uint16_t(bits), uint16_t(bits >> 16)};
    Fp16 x, y;
    std::memcpy(static_cast<void*>(&x), half, 2);
    std::memcpy(static_cast<void*>(&y), half + 1, 2);
    return {to_float(x), to_float(y)};
  }
}

/// The products of two pairs, rounded to nearest even. PTX: fma.rn.bf16x2 (with -0), mul.rn.f16x2
template <class E>
KDA_DEVICE uint32_t multiply2(uint32_t a, uint32_t b) {
#if defined(KDA_EMULATE)
  float2 const x = unpack2<E>(a), y = unpack2<E>(b);
  return pack2<E>(x.x * y.x, x.y * y.y);
#else
  uint32_t product;
  if constexpr (std::is_same_v<E, Bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  else asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
#endif
}

/// Rounded to tf32's ten mantissa bits, halves away from zero. PTX: cvt.rna.tf32.f32
KDA_DEVICE uint32_t float_to_tf32(float x) {
#if defined(KDA_EMULATE)
  uint32_t const bits = float_to_bits(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & 0xFFFFE000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

/// A finite x as an operand of a tf32 product, which ignores the low 13 bits: rounded as float_to_tf32 does, in one
/// instruction.
KDA_DEVICE uint32_t float_for_tf32(float x) { return float_to_bits(x) + 0x1000u; }

}  // namespace kda
