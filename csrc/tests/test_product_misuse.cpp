// Planted bugs of warpgroup products.
#include "tests/misuse.h"

namespace kda::tests {
namespace {

struct Operands {
  tile::SharedTile<Bf16, 64, 64> a, b;
};
using ProductKernel = void (*)(Operands& s, MmaAccumulator (&d)[8], uint32_t* global);

/// Fills both operands with ones, which all threads then know, and goes on with `body`.
void product_kernel(uint32_t* global, ProductKernel body) {
  KDA_SHARED(Operands, s);
  for (int i = thread_index(); i < 64 * 64; i += int(blockDim.x)) s.a.data[i] = s.b.data[i] = from_float<Bf16>(1.f);
  fence_proxy_async();
  sync_block();
  MmaAccumulator d[8];
  body(s, d, global);
}
uint64_t descriptor_of(tile::SharedTile<Bf16, 64, 64> const& x) { return wgmma_descriptor(x.data, 0, 1024); }
void start(MmaAccumulator (&d)[8], uint64_t a, uint64_t b, emulator::Location where = emulator::Location::here()) {
  wgmma_m64k16_shared<Bf16, 64, false, false>(d, a, b, false, where);
}
void start(MmaAccumulator (&d)[8], Operands const& s, emulator::Location where = emulator::Location::here()) {
  start(d, descriptor_of(s.a), descriptor_of(s.b), where);
}

class ProductMisuse : public testing::Test {
 protected:
  std::vector<uint32_t> out;  // global memory afterwards

  std::string said(ProductKernel body, unsigned threads = 128) {
    return complaint(threads, product_kernel, &out, body);
  }
  void expect(std::string const& text, ProductKernel body, unsigned threads = 128) {
    expect_said(said(body, threads), text, __FILE__);
  }
};

TEST_F(ProductMisuse, ProductNeverWaitedFor) {
  expect(
      "wgmma results that were never waited for, started", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        MARK start(d, s);
        wgmma_commit();
      });
}
TEST_F(ProductMisuse, ProductReadBeforeTheWait) {
  EXPECT_EQ(said(+[](Operands& s, MmaAccumulator(&d)[8], uint32_t* global) {
              start(d, s);
              wgmma_commit();
              wgmma_wait<1>();  // one group too many may be on its way
              float const early = d[3].x[2];
              wgmma_wait<0>();
              global[thread_index()] = early != early ? 1000 : uint32_t(early);
              global[128 + thread_index()] = uint32_t(d[3].x[2]);
            }),
            "");
  EXPECT_EQ(count_of(out, 1000), 128);
  EXPECT_EQ(count_of(out, 16), 128);
}
TEST_F(ProductMisuse, OperandOverwrittenBeforeTheWait) {
  EXPECT_EQ(said(+[](Operands& s, MmaAccumulator(&d)[8], uint32_t* global) {
              start(d, s);
              wgmma_commit();
              for (int i = thread_index(); i < 64 * 64; i += 128) s.a.data[i] = from_float<Bf16>(3.f);
              wgmma_wait<0>();
              global[thread_index()] = uint32_t(d[0].x[0]);
            }),
            "");
  EXPECT_LT(count_of(out, 16), 128);
}
TEST_F(ProductMisuse, AccumulatorWrittenInFlight) {
  expect(
      "an accumulator was written while in flight", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        start(d, s);
        d[1].x[1] = 0;
        MARK start(d, s);
        wgmma_commit();
        wgmma_wait<0>();
      });
}
TEST_F(ProductMisuse, ProductOfAnIncompleteWarpgroup) {
  expect(
      "wgmma by an incomplete warpgroup", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) { MARK start(d, s); }, 96);
}
TEST_F(ProductMisuse, ProductThatOneWarpMisses) {
  expect(
      "96 threads: wgmma(0)", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        if (thread_index() < 96) {
          MARK start(d, s);
        }
      });
}
TEST_F(ProductMisuse, ProductOnWhichThreadsDisagree) {
  expect(
      "the threads of a warpgroup disagree on the product", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        MARK start(d, thread_index() == 77 ? descriptor_of(s.b) : descriptor_of(s.a), descriptor_of(s.b));
      });
}
TEST_F(ProductMisuse, GroupsOnWhichThreadsDisagree) {
  expect(
      "the threads of a warpgroup disagree on the group", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        if (thread_index() < 32) wgmma_commit();
        MARK start(d, s);
      });
}
TEST_F(ProductMisuse, DescriptorOfAnotherSwizzle) {
  expect(
      "a descriptor that is not of the 128-byte swizzle", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        MARK start(d, descriptor_of(s.a) ^ uint64_t(1) << 62, descriptor_of(s.b));
      });
}
TEST_F(ProductMisuse, DescriptorThatLeavesSharedMemory) {
  expect(
      "a descriptor leaves shared memory", +[](Operands& s, MmaAccumulator(&d)[8], uint32_t*) {
        MARK start(d, descriptor_of(s.a), descriptor_of(s.b) | 0x3FC0);
        wgmma_commit();
        wgmma_wait<0>();
      });
}

}  // namespace
}  // namespace kda::tests
