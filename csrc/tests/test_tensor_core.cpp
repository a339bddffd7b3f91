// The emulator's tensor cores against the definition of what they cut off (emulator/tensor_core.h).
#include <gtest/gtest.h>

#include <cmath>

#include "tests/programs/matrices.h"

namespace kda::tests {
namespace {

/// One step of a tensor core: terms cut off `bits` below the exponent of the largest (that of a product is the sum of
/// its factors'), and the sum behind its 24th bit.
float tensor_core_step(float c, float const* a, float const* b, int count, int bits) {
  int largest = c == 0 ? -1000 : std::ilogb(c);
  for (int k = 0; k < count; ++k)
    if (a[k] != 0 && b[k] != 0) largest = std::max(largest, std::ilogb(a[k]) + std::ilogb(b[k]));
  auto const cut = [](double x, int lowest) { return std::ldexp(std::trunc(std::ldexp(x, -lowest)), lowest); };
  double sum = cut(c, largest - bits);
  for (int k = 0; k < count; ++k) sum += cut(double(a[k]) * b[k], largest - bits);
  return sum == 0 ? 0.f : float(cut(sum, std::ilogb(sum) - 23));
}
template <class E>
void expect_truncated_mma(std::vector<float> (*product)(), int depth) {
  auto const operand = [](int n, uint32_t seed) {
    std::vector<float> values;
    for (E const x : numbers<E, true>(size_t(n), seed))
      values.push_back(sizeof(E) == 4 ? bits_to_float(float_to_tf32(to_float(x))) : to_float(x));
    return values;
  };
  auto const a = operand(16 * depth, 6), b = operand(8 * depth, 7), c = numbers<float, true>(128, 8);
  for (bool const hopper : {false, true}) {
    emulator::options().has_wgmma = hopper;
    auto const out = product();
    emulator::options().has_wgmma = false;
    int const bits = hopper ? 25 : 24, step = hopper ? depth : depth / 2;
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float sum = c[m * 8 + n];
        for (int k = 0; k < depth; k += step)
          sum = tensor_core_step(sum, &a[m * depth + k], &b[n * depth + k], step, bits);
        ASSERT_EQ(out[m * 8 + n], sum) << (hopper ? "Hopper " : "Ampere ") << m << ' ' << n;
      }
  }
}
TEST(TensorCores, Truncate) {
  expect_truncated_mma<Bf16>(mma_16<Bf16, true>, 16);
  expect_truncated_mma<Fp16>(mma_16<Fp16, true>, 16);
  expect_truncated_mma<float>(mma_tf32<true>, 8);
}

}  // namespace
}  // namespace kda::tests
