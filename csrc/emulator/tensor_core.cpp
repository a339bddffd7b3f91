#include "emulator/tensor_core.h"

#include <cstdint>
#include <cstring>

#include "emulator/engine.h"

namespace kda::emulator {

TensorCore tensor_core() { return options().has_wgmma ? kHopperCore : kAmpereCore; }

// Exponents of operands, so that sums say what a product is.
constexpr int kZero = -4096, kNonFinite = 16384;
constexpr int kSmallest = -100, kLargest = 125;  // of a step, for which scales and sums are fp32 numbers

static inline KDA_NO_TSAN int exponent(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  int const field = bits >> 23 & 0xFF;
  if (field == 0xFF) return kNonFinite;
  return x == 0.f ? kZero : (field ? field : 1) - 127;
}
static inline KDA_NO_TSAN float power_of_two(int n) {
  int32_t const bits = (n + 127) << 23;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline KDA_NO_TSAN float truncated(double x) {
  float const nearest = float(x);
  if (double(nearest) == x || (nearest > 0) != (double(nearest) > x)) return nearest;
  int32_t bits;
  std::memcpy(&bits, &nearest, 4);
  --bits;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

/// One step of one row; exponents of operands beside them.
template <int kDepth>
static inline KDA_NO_TSAN void add_step(int fraction_bits, float const* a, int const* a_exponent, float const (*b)[8],
                                        int const (*b_exponent)[8], float* d) {
  int most[8];
  for (int n = 0; n < 8; ++n) most[n] = exponent(d[n]);
  for (int k = 0; k < kDepth; ++k)
    for (int n = 0; n < 8; ++n) {
      int const e = a_exponent[k] + b_exponent[k][n];
      most[n] = most[n] > e ? most[n] : e;
    }
  bool plain = false;
  float scale[8];
  for (int n = 0; n < 8; ++n) {
    plain = plain || most[n] > kLargest;
    most[n] = most[n] < kSmallest ? kSmallest : most[n] > kLargest ? kLargest : most[n];
    scale[n] = power_of_two(fraction_bits - most[n]);
  }
  if (plain) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[k] * b[k][n];
      d[n] += sum;
    }
    return;
  }
  // Below 4 * 2^25 each: eight products, then the others and the accumulator, fit 32 bits.
  int32_t sums[2][8] = {};
  for (int k = 0; k < kDepth; ++k)
    for (int n = 0; n < 8; ++n) sums[k / 8][n] += int32_t(a[k] * b[k][n] * scale[n]);
  for (int n = 0; n < 8; ++n) {
    double const sum = double(sums[0][n]) + sums[1][n] + int32_t(d[n] * scale[n]);
    d[n] = truncated(sum * (1. / scale[n]));
  }
}

template <int kDepth>
__attribute__((optimize("O3"))) KDA_NO_TSAN void add_products(TensorCore core, int rows, float const (*a)[kDepth],
                                                              float const (*b)[8], float (*d)[8]) {
  int b_exponent[kDepth][8];
  for (int k = 0; k < kDepth; ++k)
    for (int n = 0; n < 8; ++n) b_exponent[k][n] = exponent(b[k][n]);
  for (int r = 0; r < rows; ++r) {
    int a_exponent[kDepth];
    for (int k = 0; k < kDepth; ++k) a_exponent[k] = exponent(a[r][k]);
    if (core.step_bytes == 32) {
      add_step<kDepth>(core.fraction_bits, a[r], a_exponent, b, b_exponent, d[r]);
    } else {
      constexpr int kHalf = kDepth / 2;
      add_step<kHalf>(core.fraction_bits, a[r], a_exponent, b, b_exponent, d[r]);
      add_step<kHalf>(core.fraction_bits, a[r] + kHalf, a_exponent + kHalf, b + kHalf, b_exponent + kHalf, d[r]);
    }
  }
}
template void add_products<16>(TensorCore, int, float const (*)[16], float const (*)[8], float (*)[8]);
template void add_products<8>(TensorCore, int, float const (*)[8], float const (*)[8], float (*)[8]);

}  // namespace kda::emulator
