// Scalar functions. "Fast" ones use the special function units (relative error a few 2^-22); the others are accurate
// to a few units in the last place of fp32.
#pragma once
#include <cmath>

#include "platform/macros.h"

namespace kda {

KDA_DEVICE float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
KDA_DEVICE float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

#if defined(KDA_EMULATE)
namespace emulator {
/// As .ftz has it: a subnormal number is a zero of its sign.
inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
}  // namespace emulator
#endif

/// 2^x, subnormal results become zero. PTX: ex2.approx.ftz.f32
KDA_DEVICE float exp2_fast(float x) {
#if defined(KDA_EMULATE)
  return emulator::flushed(std::exp2(x));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
KDA_DEVICE float exp2_accurate(float x) { return exp2f(x); }
/// log2(x), subnormal arguments count as zero. PTX: lg2.approx.ftz.f32
KDA_DEVICE float log2_fast(float x) {
#if defined(KDA_EMULATE)
  return std::log2(emulator::flushed(x));
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// 1 / x; infinity gives zero, subnormal arguments and results count as zero. PTX: rcp.approx.ftz.f32
KDA_DEVICE float reciprocal_fast(float x) {
#if defined(KDA_EMULATE)
  return emulator::flushed(1.f / emulator::flushed(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
KDA_DEVICE float exp_accurate(float x) { return expf(x); }
KDA_DEVICE float log1p_accurate(float x) { return log1pf(x); }
KDA_DEVICE float rsqrt_accurate(float x) {
#if defined(__CUDACC__)
  return rsqrtf(x);
#else
  return 1.f / std::sqrt(x);
#endif
}

}  // namespace kda
