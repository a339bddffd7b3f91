// Scalar functions and conversions.
#pragma once
#include "tests/programs/program.h"

namespace kda::tests {

// ---- conversions -----------------------------------------------------------------------------------------------

/// All 65536 values of both 16-bit formats (fp16 NaN as zero: hardware may quieten them).
KDA_GLOBAL void to_float_kernel(float* out) {
  uint32_t const bits = blockIdx.x * 256 + thread_index();
  uint16_t const half = (bits & 0x7C00) == 0x7C00 && (bits & 0x3FF) ? 0 : bits;
  float2 const bf16 = unpack2<Bf16>(bits | (bits ^ 0xFFFF) << 16), fp16 = unpack2<Fp16>(half | 0x3C000000u);
  out[bits] = bf16.x;
  out[65536 + bits] = fp16.x;
  out[2 * 65536 + bits] = to_float(from_float<Fp16>(fp16.x));
  out[3 * 65536 + bits] = fp16.y + to_float(1.f);
}
inline std::vector<float> to_float_all() { return run(to_float_kernel, dim3(256), dim3(256), 0, 4 * 65536); }

/// Values around every rounding boundary: random bits, halves, overflow, subnormals, infinity; no NaN.
inline std::vector<float> rounding_input() {
  std::vector<float> x;
  for (uint32_t i = 0; i < 4096; ++i) {
    uint32_t bits = hash(i, 2);
    if (i % 4 == 1) bits &= 0xFFFF8000u;                           // ties of bf16
    if (i % 4 == 2) bits = (bits & 0x8FFFF000u) | 0x38000000u;     // ties of fp16, around its range
    if (i % 4 == 3) bits = (bits & 0x87FFFFFFu) | 0x33000000u;     // fp16 subnormals
    if ((bits & 0x7F800000u) == 0x7F800000u) bits &= 0xFF800000u;  // NaN to infinity
    x.push_back(bits_to_float(bits));
  }
  return x;
}
struct Rounded {
  uint32_t bf16_pair, fp16_pair, tf32, tf32_operand;
  uint16_t bf16, fp16;
  float fp32;
};
KDA_GLOBAL void rounding_kernel(Rounded* out, float const* in) {
  int const i = blockIdx.x * 256 + thread_index();
  float const x = in[i], y = in[4095 - i];
  Rounded r{};
  r.bf16_pair = pack2<Bf16>(x, y), r.fp16_pair = pack2<Fp16>(x, y);
  r.tf32 = float_to_tf32(x);
  r.tf32_operand = float_for_tf32(x) & 0xFFFFE000u;
  Bf16 const bf16 = from_float<Bf16>(x);
  Fp16 const fp16 = from_float<Fp16>(x);
  std::memcpy(&r.bf16, &bf16, 2), std::memcpy(&r.fp16, &fp16, 2);
  r.fp32 = from_float<float>(bits_to_float(float_to_bits(x) ^ 0x80000000u));
  out[i] = r;
}
inline std::vector<Rounded> rounding() {
  Buffer<float> const in(rounding_input());
  return run(rounding_kernel, dim3(16), dim3(256), 0, 4096, static_cast<float const*>(in.data()));
}

/// Products of neighbouring values of both formats, as pairs of 16-bit patterns.
template <class E>
KDA_GLOBAL void multiply2_kernel(uint32_t* out, uint32_t const* in) {
  int const i = blockIdx.x * 256 + thread_index();
  out[i] = multiply2<E>(in[i], in[4095 - i]);
}
template <class E>
std::vector<uint32_t> pair_input() {
  std::vector<float> const x = rounding_input();
  std::vector<uint32_t> pairs(4096);
  for (uint32_t i = 0; i < 4096; ++i) {  // finite, so that no product is NaN
    E const pair[2] = {from_float<E>(i % 3 ? real(i, 14) : std::fmod(x[i], 256.f)), from_float<E>(8.f * real(i, 15))};
    std::memcpy(&pairs[i], pair, 4);
  }
  return pairs;
}
template <class E>
std::vector<uint32_t> pair_products() {
  Buffer<uint32_t> const in(pair_input<E>());
  return run(multiply2_kernel<E>, dim3(16), dim3(256), 0, 4096, static_cast<uint32_t const*>(in.data()));
}

// ---- functions -------------------------------------------------------------------------------------------------

inline std::vector<float> function_input() {
  std::vector<float> x = {0.f, 1.f, -1.f, 1e-40f, 88.f, -87.f, -126.f, -126.5f, -127.f, -200.f, 127.f, 1e-30f, 3.4e38f};
  while (x.size() < 2048) x.push_back(80.f * real(uint32_t(x.size()), 3));
  return x;
}
inline constexpr int kFunctions = 6;
KDA_GLOBAL void functions_kernel(float* out, float const* in) {
  int const i = blockIdx.x * 256 + thread_index();
  float const x = in[i], positive = x < 0 ? -x : x;
  out[i] = exp2_fast(x);
  out[2048 + i] = reciprocal_fast(x);
  out[2 * 2048 + i] = exp_accurate(x);
  out[3 * 2048 + i] = log1p_accurate(positive);
  out[4 * 2048 + i] = rsqrt_accurate(positive);
  out[5 * 2048 + i] = exp2_accurate(x);
}
inline std::vector<float> functions() {
  Buffer<float> const in(function_input());
  return run(functions_kernel, dim3(8), dim3(256), 0, kFunctions * 2048, static_cast<float const*>(in.data()));
}

KDA_GLOBAL void log2_kernel(float* out, float const* in) {
  int const i = blockIdx.x * 256 + thread_index();
  out[i] = log2_fast(in[i] < 0 ? -in[i] : in[i]);
}
inline std::vector<float> logarithms() {
  Buffer<float> const in(function_input());
  return run(log2_kernel, dim3(8), dim3(256), 0, 2048, static_cast<float const*>(in.data()));
}

KDA_GLOBAL void float2_kernel(float* out, float const* in) {
  int const i = thread_index() * 2;
  float2 const product = float2{in[i], in[i + 1]} * float2{in[511 - i], in[510 - i]};
  out[i] = product.x, out[i + 1] = product.y;
}
inline std::vector<float> float2_products() {
  Buffer<float> const in(reals(512, 4));
  return run(float2_kernel, dim3(1), dim3(256), 0, 512, static_cast<float const*>(in.data()));
}

}  // namespace kda::tests
