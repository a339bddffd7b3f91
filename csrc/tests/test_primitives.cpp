// Every program against its plain definition.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/programs/all.h"

namespace kda::tests {
namespace {

template <class E>
std::vector<float> floats(std::vector<E> const& x) {
  std::vector<float> y;
  for (E const e : x) y.push_back(to_float(e));
  return y;
}

// ---- threads ---------------------------------------------------------------------------------------------------

TEST(Threads, Indices) {
  auto const records = indices();
  for (uint32_t block = 0; block < 12; ++block)
    for (uint32_t thread = 0; thread < 192; ++thread) {
      IndexRecord const& r = records[block * 192 + thread];
      ASSERT_EQ(r.block, block);
      ASSERT_EQ(r.grid, 12u);
      ASSERT_EQ(r.x, thread % 32);
      ASSERT_EQ(r.y, thread / 32 % 2);
      ASSERT_EQ(r.z, thread / 64);
      ASSERT_EQ(r.thread, r.x);
      ASSERT_EQ(r.anew, r.x);
      ASSERT_EQ(r.warp, r.x / 32);
      ASSERT_EQ(r.lane, r.x);
    }
}

TEST(Threads, SharedObjects) {
  auto const out = shared_objects();
  for (uint32_t i = 0; i < 3 * 64; ++i) {
    uint32_t const t = 63 - i % 64;
    ASSERT_EQ(out[i], (7 + t) ^ (255 - t) << 8 ^ (t * 3) << 16) << i;
  }
}

TEST(Threads, SyncBlock) {
  std::vector<uint32_t> x(96);
  for (uint32_t t = 0; t < 96; ++t) x[t] = t;
  for (uint32_t s = 0; s < 6; ++s) {
    std::vector<uint32_t> const before = x;
    for (uint32_t t = 0; t < 96; ++t) x[t] = before[t] * 5 + before[(t + 7 * (s + 1)) % 96];
  }
  EXPECT_EQ(sync_block_ring(), x);
}

TEST(Threads, NamedBarriers) {
  std::vector<uint32_t> sum(96);
  for (uint32_t t = 32; t < 96; ++t)
    for (uint32_t i = 0; i < 7; ++i) sum[t] = sum[t] * 3 + i * 100 + (t + t / 32) % 32;
  EXPECT_EQ(named_barrier_pipeline(), sum);
}

TEST(Threads, SyncWarp) {
  std::vector<uint32_t> x(32), reversed(32);
  for (uint32_t l = 0; l < 32; ++l) x[l] = l;
  for (int i = 0; i < 5; ++i) {
    std::vector<uint32_t> const before = x;
    for (uint32_t l = i < 3 ? 0 : 16; l < 32; ++l) x[l] = before[l] * 7 + before[l ^ 5];
  }
  for (uint32_t l = 0; l < 32; ++l) reversed[l] = x[31 - l];
  EXPECT_EQ(sync_warp_halves(), reversed);
}

TEST(Threads, Shuffles) {
  auto const out = shuffles();
  for (uint32_t l = 0; l < 32; ++l) {
    ASSERT_EQ(out[l], (5 * l + 3) % 32 * 2654435761u);
    ASSERT_EQ(out[32 + l], 9 * 2654435761u);
    for (uint32_t bits = 1; bits < 32; ++bits) ASSERT_EQ(out[32 + bits * 32 + l], (l ^ bits) * 2654435761u);
    ASSERT_EQ(out[33 * 32 + l], 1u);
  }
}

TEST(Threads, Sums) {
  auto const in = sums_input(), out = sums();
  for (int l = 0; l < 32; ++l) ASSERT_EQ(out[l], out[0]);
  double sum = 0;
  for (int l = 0; l < 32; ++l) sum += in[l];
  EXPECT_NEAR(out[0], sum, 1e-5);
  for (int c = 0; c < 6; ++c) {
    int const count = 1 << c;
    for (int l = 0; l < 32; ++l) {
      double group = 0, warp = 0;
      for (int other = 0; other < 32; ++other) {
        double const x = in[other * 32 + l % count];
        warp += x;
        if (other / count == l / count) group += x;
      }
      ASSERT_NEAR(out[32 + c * 64 + l], group, 1e-5) << count << ' ' << l;
      ASSERT_NEAR(out[32 + c * 64 + 32 + l], warp, 1e-5) << count << ' ' << l;
    }
  }
}

TEST(Threads, Registers) {
  auto const out = registers();
  for (uint32_t t = 0; t < 384; ++t) ASSERT_EQ(out[t], (t + 200) % 384);
}

// ---- scalars ---------------------------------------------------------------------------------------------------

/// sign, exponent and mantissa of a 16-bit format, as a real number.
float decode(uint32_t bits, int mantissa_bits, int bias) {
  int const exponent_bits = 15 - mantissa_bits, exponent = int(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  float const mantissa = float(bits & ((1u << mantissa_bits) - 1)), sign = bits >> 15 & 1 ? -1.f : 1.f;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + std::ldexp(1.f, mantissa_bits), exponent - bias - mantissa_bits);
}
bool same(float x, float y) { return std::isnan(x) ? std::isnan(y) : float_to_bits(x) == float_to_bits(y); }

TEST(Scalars, ToFloat) {
  auto const out = to_float_all();
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    ASSERT_TRUE(same(out[bits], decode(bits, 7, 127))) << bits;
    bool const nan = (bits & 0x7C00) == 0x7C00 && bits & 0x3FF;
    float const fp16 = nan ? 0.f : decode(bits, 10, 15);
    ASSERT_TRUE(same(out[65536 + bits], fp16)) << bits;
    ASSERT_TRUE(same(out[2 * 65536 + bits], fp16)) << bits;
    ASSERT_EQ(out[3 * 65536 + bits], 2.f);
  }
}

/// Round to nearest even, by trying both neighbours.
float rounded(float x, int mantissa_bits, int bias) {
  if (std::isinf(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  int const lowest = 1 - bias, step = std::max(exponent - 1, lowest) - mantissa_bits;
  double const scaled = std::ldexp(double(x), -step), nearest = std::nearbyint(scaled);
  double const y = std::ldexp(nearest, step), limit = std::ldexp(2. - std::ldexp(1., -mantissa_bits), bias);
  return std::fabs(y) > limit ? std::copysign(INFINITY, x) : float(std::copysign(y, x));
}
TEST(Scalars, Rounding) {
  auto const in = rounding_input();
  auto const out = rounding();
  for (size_t i = 0; i < in.size(); ++i) {
    float const bf16 = rounded(in[i], 7, 127), fp16 = rounded(in[i], 10, 15);
    ASSERT_TRUE(same(decode(out[i].bf16, 7, 127), bf16)) << in[i];
    ASSERT_TRUE(same(decode(out[i].fp16, 10, 15), fp16)) << in[i];
    size_t const j = in.size() - 1 - i;
    ASSERT_EQ(out[i].bf16_pair, out[i].bf16 | uint32_t(out[j].bf16) << 16);
    ASSERT_EQ(out[i].fp16_pair, out[i].fp16 | uint32_t(out[j].fp16) << 16);
    ASSERT_EQ(out[i].fp32, -in[i]);
    float const tf32 = bits_to_float(out[i].tf32);
    ASSERT_EQ(out[i].tf32 & 0x1FFF, 0u);
    ASSERT_EQ(out[i].tf32_operand, out[i].tf32);
    if (std::isinf(tf32)) {
      ASSERT_GE(std::fabs(in[i]), std::ldexp(2. - std::ldexp(1., -11), 127));
    } else {  // at most half a unit away; halves away from zero
      double const unit = std::ldexp(1., std::max(std::ilogb(in[i] == 0 ? 1.f : in[i]), -126) - 10);
      ASSERT_LE(std::fabs(double(tf32) - in[i]), unit / 2) << in[i];
      if (std::fabs(double(tf32) - in[i]) == unit / 2) {
        ASSERT_GT(std::fabs(tf32), std::fabs(in[i]));
      }
    }
  }
}

template <class E>
void expect_pair_products(int mantissa_bits, int bias) {
  auto const in = pair_input<E>(), out = pair_products<E>();
  for (size_t i = 0; i < in.size(); ++i)
    for (int h = 0; h < 2; ++h) {
      auto const value = [&](uint32_t pair) { return decode(pair >> 16 * h & 0xFFFF, mantissa_bits, bias); };
      float const product = rounded(value(in[i]) * value(in[in.size() - 1 - i]), mantissa_bits, bias);
      ASSERT_TRUE(same(value(out[i]), product)) << value(in[i]) << " * " << value(in[in.size() - 1 - i]);
    }
}
TEST(Scalars, PairProducts) {
  expect_pair_products<Bf16>(7, 127);
  expect_pair_products<Fp16>(10, 15);
}

TEST(Scalars, Functions) {
  auto const in = function_input(), out = functions(), logarithm = logarithms();
  auto const flushed = [](double x) { return std::fabs(x) < 0x1p-126 ? 0. : x; };
  auto const close = [](float got, double expected) {
    if (std::isinf(float(expected)) || std::isnan(expected)) return same(got, float(expected));
    return std::fabs(got - expected) <= 0x1p-21 * std::fabs(expected) + 0x1p-149;
  };
  for (size_t i = 0; i < in.size(); ++i) {
    double const x = in[i], positive = std::fabs(x);
    EXPECT_TRUE(close(out[i], flushed(std::exp2(x)))) << x;
    EXPECT_TRUE(close(out[2048 + i], flushed(1 / std::copysign(flushed(x), x)))) << x;
    EXPECT_TRUE(close(out[2 * 2048 + i], std::exp(x))) << x;
    EXPECT_TRUE(close(out[3 * 2048 + i], std::log1p(positive))) << x;
    EXPECT_TRUE(close(out[4 * 2048 + i], 1 / std::sqrt(positive))) << x;
    EXPECT_TRUE(close(out[5 * 2048 + i], std::exp2(x))) << x;
    if (positive < 0x1p-126) EXPECT_EQ(logarithm[i], -INFINITY) << x;
    else EXPECT_NEAR(logarithm[i], std::log2(positive), 0x1p-22 * std::max(1., std::fabs(std::log2(positive)))) << x;
  }
}

TEST(Scalars, Float2) {
  auto const in = reals(512, 4), out = float2_products();
  for (size_t i = 0; i < 512; ++i) ASSERT_EQ(out[i], in[i] * in[511 - i]);
}

// ---- matrices --------------------------------------------------------------------------------------------------

TEST(Matrices, CpAsync) {
  auto const in = copy_input(), out = copies();
  auto const bytes = [](uint4 const& x) { return reinterpret_cast<unsigned char const*>(&x); };
  for (int g = 0; g < 3; ++g)
    for (int l = 0; l < 32; ++l) {
      int const source = l ^ (g == 0 ? 0 : g == 1 ? 1 : 3), valid = g < 2 ? (source + g) % 17 : 16;
      for (int b = 0; b < 16; ++b)
        ASSERT_EQ(bytes(out[g * 32 + l])[b], b < valid ? bytes(in[g * 32 + source])[b] : 0) << g << ' ' << l;
    }
}

TEST(Matrices, Moves) {
  auto const out = matrix_moves();
  auto const value = [](int m, int r, int c) { return uint16_t((m * 64 + r * 8 + c) * 257); };
  auto const pair = [](uint16_t x, uint16_t y) { return uint32_t(x) | uint32_t(y) << 16; };
  for (int m = 0; m < 4; ++m)
    for (int l = 0; l < 32; ++l) {
      int const r = l / 4, c = l % 4 * 2, i = m * 32 + l;
      uint32_t const plain = pair(value(m, r, c), value(m, r, c + 1)),
                     transposed = pair(value(m, c, r), value(m, c + 1, r));
      ASSERT_EQ(out[i], plain);
      ASSERT_EQ(out[128 + i], transposed);
      ASSERT_EQ(out[256 + i], transposed);
      ASSERT_EQ(out[384 + i], plain);       // the image, row by row
      ASSERT_EQ(out[512 + i], transposed);  // its transpose
    }
  for (uint32_t l = 0; l < 32; ++l) ASSERT_EQ(out[640 + l], sizeof(Matrices) + l);
}

template <class E>
void expect_mma(std::vector<float> const& out, int depth) {
  auto const a = floats(integers<E>(size_t(16) * depth, 6)), b = floats(integers<E>(size_t(8) * depth, 7));
  auto const c = integers<float>(128, 8);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = c[m * 8 + n];
      for (int k = 0; k < depth; ++k) sum += a[m * depth + k] * b[n * depth + k];
      ASSERT_EQ(out[m * 8 + n], sum) << m << ' ' << n;
    }
}
TEST(Matrices, MmaBf16) { expect_mma<Bf16>(mma_16<Bf16, false>(), 16); }
TEST(Matrices, MmaFp16) { expect_mma<Fp16>(mma_16<Fp16, false>(), 16); }
TEST(Matrices, MmaTf32) { expect_mma<float>(mma_tf32<false>(), 8); }

// ---- bulk copies -----------------------------------------------------------------------------------------------

TEST(BulkCopies, Mbarriers) {
  std::vector<uint32_t> sum(96);
  for (uint32_t t = 0; t < 96; ++t) {
    sum[t] = t;
    for (uint32_t i = 0; t >= 32 && i < 9; ++i) sum[t] = sum[t] * 5 + i * 1000 + (t + i + t / 32) % 32;
  }
  EXPECT_EQ(mbarrier_pipeline(), sum);
}

TEST(BulkCopies, Stream) {
  auto const in = bulk_input(), out = bulk_stream();
  for (uint32_t i = 0; i < in.size(); ++i) {
    uint32_t const step = i / kBulkWords, last = (step + 1) * kBulkWords - 1;
    ASSERT_EQ(out[i], in[last - i % kBulkWords] * 2 + step);
  }
}

/// visit(offset in the box's image, element of the tensor or -1) for one box, by the definition.
template <class Case, class Visit>
void walk_box(typename Case::Shape const& shape, int const (&at)[Case::kRank], Visit const& visit) {
  for (int e = 0; e < Case::kBoxElements; ++e) {
    int rest = e;
    int64_t element = 0;
    for (int i = 0; i < Case::kRank; ++i) {
      int64_t const x = at[i] + rest % shape.box[i];
      rest /= shape.box[i];
      element = element < 0 || x < 0 || x >= shape.sizes[i] ? -1 : element + x * (i ? shape.strides[i - 1] : 1);
    }
    int const piece = 16 / int(sizeof(typename Case::Element)), row = e / Case::kRow, column = e % Case::kRow;
    int const place = Case::kSwizzle == TensorSwizzle::k128B
                          ? row * Case::kRow + (column / piece ^ row % 8) * piece + column % piece
                          : e;
    visit(place, element);
  }
}
TEST(BulkCopies, TensorLoads) {
  visit_tensors([](std::string const& name, auto tensor) {
    using Case = decltype(tensor);
    auto const shape = Case::shape();
    auto const in = floats(integers<typename Case::Element>(Case::elements(), 10)),
               out = floats(tensor_load_boxes<Case>());
    for (int b = 0; b < Case::kBoxes; ++b)
      walk_box<Case>(shape, shape.at[b], [&](int place, int64_t element) {
        ASSERT_EQ(out[size_t(b) * Case::kBoxElements + place], element < 0 ? 0.f : in[element]) << name << " box " << b;
      });
  });
}
TEST(BulkCopies, TensorStores) {
  visit_tensors([](std::string const& name, auto tensor) {
    using Case = decltype(tensor);
    auto const shape = Case::shape(true);
    auto const out = floats(tensor_store_boxes<Case>());
    std::vector<float> expected(Case::elements(), NAN);
    for (int b = 0; b < Case::kBoxes; ++b)
      walk_box<Case>(shape, shape.at[b], [&](int place, int64_t element) {
        if (element >= 0) expected[element] = float(place % 61 + b);
      });
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_TRUE(same(out[i], expected[i])) << name << ' ' << i;
  });
}

template <class E, size_t kRank>
std::string rejection(int64_t const (&sizes)[kRank], int64_t const (&strides)[kRank - 1], int const (&box)[kRank],
                      TensorSwizzle swizzle, int offset = 0) {
  alignas(16) static E data[64];
  try {
    make_tensor_map<E, int(kRank)>(data + offset, sizes, strides, box, swizzle);
  } catch (std::invalid_argument const& error) {
    return error.what();
  }
  return "";
}
TEST(BulkCopies, TensorMapsThatCannotBe) {
  auto const none = TensorSwizzle::kNone, b128 = TensorSwizzle::k128B;
  EXPECT_EQ(rejection<Bf16>({64, 64}, {64}, {64, 64}, b128), "");
  EXPECT_EQ(rejection<Bf16>({64, 64}, {64}, {64, 64}, b128, 1),
            "make_tensor_map: the address is not a multiple of 16 bytes");
  EXPECT_EQ(rejection<Bf16>({64, 0}, {64}, {64, 64}, b128), "make_tensor_map: dimension 1 has size 0");
  EXPECT_EQ(rejection<Bf16>({64, 64}, {60}, {64, 64}, b128),
            "make_tensor_map: dimension 1 has a stride of 120 bytes, not a multiple of 16 below 2^40");
  EXPECT_EQ(rejection<Bf16>({64, 64}, {64}, {64, 257}, none), "make_tensor_map: dimension 1 of the box has size 257");
  EXPECT_EQ(rejection<Bf16>({64, 64}, {64}, {4, 64}, none),
            "make_tensor_map: a row of the box has 8 bytes, not a multiple of 16");
  EXPECT_EQ(rejection<float>({64, 64}, {64}, {64, 64}, b128),
            "make_tensor_map: a row of the box has 256 bytes, not the 128 of the swizzle");
}

// ---- products of warpgroups ------------------------------------------------------------------------------------

TEST(WarpgroupProducts, All) {
  visit_products([](std::string const& name, auto product_case) {
    using Case = decltype(product_case);
    using E = typename Case::Element;
    auto const a = floats(integers<E>(64 * kProductDepth, 11)),
               b = floats(integers<E>(size_t(kProductDepth) * Case::kN, 12));
    auto const out = product<Case>();
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < Case::kN; ++n) {
        float sum = 0;
        for (int k = 0; k < kProductDepth; ++k)
          sum += a[m * kProductDepth + k] * b[k * Case::kN + n] * (k < kProductDepth / 2 ? 2.f : 1.f);
        ASSERT_EQ(out[m * Case::kN + n], sum) << name << ' ' << m << ' ' << n;
      }
  });
}

TEST(WarpgroupProducts, Overlapping) {
  auto const b = floats(integers<Bf16>(64 * kProductDepth, 13)), out = overlapping_products();
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 64; ++i) {
      int const m = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, n = i % 32 / 4 * 8 + t % 4 * 2 + i % 2;
      int const left = i < 32 ? 0 : 16, right = i < 32 ? 0 : 64;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += b[m * kProductDepth + left + k] * b[n * kProductDepth + right + k];
      ASSERT_EQ(out[i * 128 + t], sum);
    }
}

}  // namespace
}  // namespace kda::tests
