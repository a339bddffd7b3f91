// Planted bugs of mbarriers, bulk copies, tensor maps and warpgroup products.
#include "tests/misuse.h"

namespace kda::tests {
namespace {

/// Thread 0 makes barrier 0 for `count` arrivals; the block then knows it.
void make_barrier(Words* s, uint32_t count) {
  if (thread_index() == 0) {
    mbarrier_init(s->barrier[0], count);
    fence_mbarrier_init();
  }
  sync_block();
}

// ---- mbarriers -------------------------------------------------------------------------------------------------

TEST(AsyncMisuse, BarrierNeverInitialised) {
  expect_complaint(
      32, "mbarrier.arrive: the mbarrier was never initialised", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK mbarrier_arrive(s->barrier[0]);
      });
  expect_complaint(
      32, "mbarrier.try_wait: the mbarrier was never initialised", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK mbarrier_wait(s->barrier[1], 0);
      });
}
TEST(AsyncMisuse, BarrierInitialisedTwice) {
  expect_complaint(
      32, "of a barrier that was initialised at", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        MARK mbarrier_init(s->barrier[0], 1);
      });
}
TEST(AsyncMisuse, BarrierOverwritten) {
  expect_complaint(
      32, "was overwritten; found", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        s->barrier[0].word = 5;
        MARK mbarrier_arrive(s->barrier[0]);
      });
}
TEST(AsyncMisuse, BarrierCountZero) {
  expect_complaint(
      32, "mbarrier.init: count 0", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK mbarrier_init(s->barrier[0], 0);
      });
}
TEST(AsyncMisuse, TooManyArrivals) {
  expect_complaint(
      32, "more than 1 arrivals in one phase", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        if (thread_index() != 0) return;
        mbarrier_arrive_expect_tx(s->barrier[0], 16);
        MARK mbarrier_arrive(s->barrier[0]);
      });
}
TEST(AsyncMisuse, TooFewArrivals) {
  expect_complaint(
      64, "1 of 33 arrivals and 0 bytes outstanding", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 33);
        if (thread_index() < 32) mbarrier_arrive(s->barrier[0]);
        else {
          MARK mbarrier_wait(s->barrier[0], 0);
        }
      });
}
TEST(AsyncMisuse, ParityThatIsNone) {
  expect_complaint(
      32, "parity 2 is neither 0 nor 1", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        MARK mbarrier_wait(s->barrier[0], 2);
      });
}

// ---- loads -----------------------------------------------------------------------------------------------------

/// Expects kExpected bytes, loads 64, waits.
template <int kExpected>
void load_expecting(uint32_t* global) {
  KDA_DYNAMIC_SHARED(Words, s);
  make_barrier(s, 1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect_tx(s->barrier[0], kExpected);
    bulk_load(s->word, global, 64, s->barrier[0]);
  }
  MARK mbarrier_wait(s->barrier[0], 0);
}
TEST(AsyncMisuse, MoreBytesExpectedThanLoaded) {
  expect_complaint(32, "0 of 1 arrivals and 16 bytes outstanding", &load_expecting<80>);
}
TEST(AsyncMisuse, FewerBytesExpectedThanLoaded) {
  expect_complaint(32, "0 of 1 arrivals and -16 bytes outstanding", &load_expecting<48>);
}
TEST(AsyncMisuse, NothingExpected) {
  expect_complaint(
      32, "expected bytes and arrived bytes differ by -64", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        if (thread_index() != 0) return;
        mbarrier_init(s->barrier[1], 1);
        MARK mbarrier_init(s->barrier[0], 1);
        bulk_load(s->word, global, 64, s->barrier[0]);
        mbarrier_arrive_expect_tx(s->barrier[1], 64);
        bulk_load(s->word + 16, global, 64, s->barrier[1]);
        mbarrier_wait(s->barrier[1], 0);  // the first one has landed by then
      });
}
TEST(AsyncMisuse, LoadNeverWaitedFor) {
  expect_complaint(
      32, "bulk copy", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        if (thread_index() == 0) {
          mbarrier_arrive_expect_tx(s->barrier[0], 64);
          MARK bulk_load(s->word, global, 64, s->barrier[0]);
        }
      });
}
TEST(AsyncMisuse, PhaseThatNobodyWaitedFor) {
  expect_complaint(
      32, "nobody waited for the bulk copy issued", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        if (thread_index() == 0) mbarrier_init(s->barrier[1], 1);
        make_barrier(s, 1);
        if (thread_index() != 0) return;
        mbarrier_arrive_expect_tx(s->barrier[0], 64);
        MARK bulk_load(s->word, global, 64, s->barrier[0]);
        mbarrier_arrive_expect_tx(s->barrier[1], 64);
        bulk_load(s->word + 16, global, 64, s->barrier[1]);
        mbarrier_wait(s->barrier[1], 0);  // the other one
      });
}
TEST(AsyncMisuse, LoadReadBeforeTheWait) {
  std::vector<uint32_t> out;
  EXPECT_EQ(complaint(
                32,
                +[](uint32_t* global) {
                  KDA_DYNAMIC_SHARED(Words, s);
                  make_barrier(s, 1);
                  if (thread_index() == 0) {
                    mbarrier_arrive_expect_tx(s->barrier[0], 128);
                    bulk_load(s->word, global, 128, s->barrier[0]);
                  }
                  sync_warp();
                  uint32_t const early = s->word[thread_index()];
                  mbarrier_wait(s->barrier[0], 0);
                  global[64 + thread_index()] = early;
                },
                &out),
            "");
  int poisoned = 0;
  for (uint32_t const x : out) poisoned += x == ~0u;
  EXPECT_EQ(poisoned, 32);
}
TEST(AsyncMisuse, LoadWithoutABarrier) {
  expect_complaint(
      32, "cp.async.bulk: the mbarrier was never initialised", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK bulk_load(s->word, global, 64, s->barrier[0]);
      });
}
TEST(AsyncMisuse, MisalignedBulkCopy) {
  expect_complaint(
      32, "an address or the size is not a multiple of 16", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        MARK bulk_load(s->word, global, 72, s->barrier[0]);
      });
  expect_complaint(
      32, "an address or the size is not a multiple of 16", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK bulk_store(global + 1, s->word, 64);
      });
}

// ---- stores ----------------------------------------------------------------------------------------------------

TEST(AsyncMisuse, StoreNeverCommitted) {
  expect_complaint(
      32, "bulk store that was never committed, issued", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        s->word[thread_index()] = 1;
        sync_warp();
        if (thread_index() != 0) return;
        MARK bulk_store(global, s->word, 128);
      });
}
TEST(AsyncMisuse, ExitWhileAStoreReads) {
  expect_complaint(
      32, "exits while a bulk store may still read its shared memory, issued", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        s->word[thread_index()] = 1;
        sync_warp();
        if (thread_index() != 0) return;
        MARK bulk_store(global, s->word, 128);
        bulk_store_commit();
      });
}
/// What global memory holds after one thread stores four words and overwrites the first after `wait`.
template <class Wait>
uint32_t stored_word(Wait) {
  std::vector<uint32_t> out;
  EXPECT_EQ(complaint(
                1,
                +[](uint32_t* global) {
                  KDA_DYNAMIC_SHARED(Words, s);
                  for (int i = 0; i < 4; ++i) s->word[i] = 100;
                  bulk_store(global, s->word, 16);
                  bulk_store_commit();
                  Wait{}();
                  s->word[0] = 7;
                  bulk_store_wait<0>();
                },
                &out),
            "");
  for (uint32_t const x : out)
    if (x == 7) return 7;
  return 100;
}
TEST(AsyncMisuse, ReuseBeforeAStoreHasRead) {
  struct None {
    void operator()() const {}
  };
  struct TooLoose {
    void operator()() const { bulk_store_wait_read<1>(); }
  };
  struct Enough {
    void operator()() const { bulk_store_wait_read<0>(); }
  };
  EXPECT_EQ(stored_word(None{}), 7u);
  EXPECT_EQ(stored_word(TooLoose{}), 7u);
  EXPECT_EQ(stored_word(Enough{}), 100u);
}
TEST(AsyncMisuse, GlobalMemoryReadBeforeTheStoreIsDone) {
  std::vector<uint32_t> out;
  EXPECT_EQ(complaint(
                1,
                +[](uint32_t* global) {
                  KDA_DYNAMIC_SHARED(Words, s);
                  for (int i = 0; i < 4; ++i) s->word[i] = 100;
                  bulk_store(global, s->word, 16);
                  bulk_store_commit();
                  bulk_store_wait_read<0>();
                  uint32_t const early = global[1];
                  bulk_store_wait<0>();
                  global[8] = early;
                },
                &out),
            "");
  int poisoned = 0;
  for (uint32_t const x : out) poisoned += x == ~0u;
  EXPECT_EQ(poisoned, 1);
}

// ---- tensor maps -----------------------------------------------------------------------------------------------

/// A map of 16 x 64 bf16 at `global`.
TensorMap map_of(uint32_t* global, TensorSwizzle swizzle) {
  return make_tensor_map<Bf16, 2>(reinterpret_cast<Bf16*>(global), {64, 16}, {64}, {64, 8}, swizzle);
}
TEST(AsyncMisuse, TensorCopyOfAnotherRank) {
  expect_complaint(
      32, "cp.async.bulk.tensor: the map has another rank", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        TensorMap const map = map_of(global, TensorSwizzle::kNone);
        MARK tensor_load(s->word, map, {0, 0, 0}, s->barrier[0]);
      });
  expect_complaint(
      32, "cp.async.bulk.tensor: the map has another rank", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        TensorMap const map = map_of(global, TensorSwizzle::kNone);
        MARK tensor_store(map, {0, 0, 0}, s->word);
      });
}
TEST(AsyncMisuse, MisalignedTensorCopy) {
  expect_complaint(
      32, "not a multiple of 128 bytes", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        TensorMap const map = map_of(global, TensorSwizzle::kNone);
        MARK tensor_load(s->word + 16, map, {0, 0}, s->barrier[0]);
      });
  expect_complaint(
      32, "not a multiple of 1024 bytes (128-byte swizzle)", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        TensorMap const map = map_of(global, TensorSwizzle::k128B);
        MARK tensor_load(s->word + 32, map, {0, 0}, s->barrier[0]);
      });
}
TEST(AsyncMisuse, TensorBytesCountedWithoutThePartBeyondTheBorder) {
  expect_complaint(
      32, "0 of 1 arrivals and -512 bytes outstanding", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        make_barrier(s, 1);
        TensorMap const map = map_of(global, TensorSwizzle::kNone);
        if (thread_index() == 0) {
          mbarrier_arrive_expect_tx(s->barrier[0], 512);  // four of the eight rows are inside
          tensor_load(s->word, map, {0, 12}, s->barrier[0]);
        }
        MARK mbarrier_wait(s->barrier[0], 0);
      });
}

// ---- products of warpgroups ------------------------------------------------------------------------------------

struct Operands {
  tile::SharedTile<Bf16, 64, 64> a, b;
};
/// Fills both operands with ones.
Operands* operands() {
  KDA_SHARED(Operands, s);
  for (int i = thread_index(); i < 64 * 64; i += 128) s.a.data[i] = s.b.data[i] = from_float<Bf16>(1.f);
  fence_proxy_async();
  sync_block();
  return &s;
}
uint64_t descriptor_of(tile::SharedTile<Bf16, 64, 64> const& x) { return wgmma_descriptor(x.data, 0, 1024); }
void start(MmaAccumulator (&d)[8], uint64_t a, uint64_t b, emulator::Location where = emulator::Location::here()) {
  wgmma_m64k16_shared<Bf16, 64, false, false>(d, a, b, false, where);
}

TEST(AsyncMisuse, ProductNeverWaitedFor) {
  expect_complaint(
      128, "wgmma results that were never waited for, started", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        MARK start(d, descriptor_of(s->a), descriptor_of(s->b));
        wgmma_commit();
      });
}
TEST(AsyncMisuse, ProductReadBeforeTheWait) {
  std::vector<uint32_t> out;
  EXPECT_EQ(complaint(
                128,
                +[](uint32_t* global) {
                  Operands* s = operands();
                  MmaAccumulator d[8];
                  start(d, descriptor_of(s->a), descriptor_of(s->b));
                  wgmma_commit();
                  wgmma_wait<1>();  // one group too many may be on its way
                  float const early = d[3].x[2];
                  wgmma_wait<0>();
                  global[thread_index()] = early != early ? 1000 : uint32_t(early);
                  global[128 + thread_index()] = uint32_t(d[3].x[2]);
                },
                &out),
            "");
  int nan = 0, right = 0;
  for (uint32_t const x : out) nan += x == 1000, right += x == 16;
  EXPECT_EQ(nan, 128);
  EXPECT_EQ(right, 128);
}
TEST(AsyncMisuse, OperandOverwrittenBeforeTheWait) {
  std::vector<uint32_t> out;
  EXPECT_EQ(complaint(
                128,
                +[](uint32_t* global) {
                  Operands* s = operands();
                  MmaAccumulator d[8];
                  start(d, descriptor_of(s->a), descriptor_of(s->b));
                  wgmma_commit();
                  for (int i = thread_index(); i < 64 * 64; i += 128) s->a.data[i] = from_float<Bf16>(3.f);
                  wgmma_wait<0>();
                  global[thread_index()] = uint32_t(d[0].x[0]);
                },
                &out),
            "");
  int right = 0;
  for (uint32_t const x : out) right += x == 16;
  EXPECT_LT(right, 128);
}
TEST(AsyncMisuse, AccumulatorWrittenInFlight) {
  expect_complaint(
      128, "an accumulator was written while in flight", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        start(d, descriptor_of(s->a), descriptor_of(s->b));
        d[1].x[1] = 0;
        MARK start(d, descriptor_of(s->a), descriptor_of(s->b));
        wgmma_commit();
        wgmma_wait<0>();
      });
}
TEST(AsyncMisuse, ProductOfAnIncompleteWarpgroup) {
  expect_complaint(
      96, "wgmma by an incomplete warpgroup", +[](uint32_t*) {
        KDA_SHARED(Operands, s);
        MmaAccumulator d[8];
        MARK start(d, descriptor_of(s.a), descriptor_of(s.b));
      });
}
TEST(AsyncMisuse, ProductThatOneWarpMisses) {
  expect_complaint(
      128, "96 threads: wgmma(0)", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        if (thread_index() < 96) {
          MARK start(d, descriptor_of(s->a), descriptor_of(s->b));
        }
      });
}
TEST(AsyncMisuse, ProductOnWhichThreadsDisagree) {
  expect_complaint(
      128, "the threads of a warpgroup disagree on the product", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        MARK start(d, thread_index() == 77 ? descriptor_of(s->b) : descriptor_of(s->a), descriptor_of(s->b));
      });
}
TEST(AsyncMisuse, GroupsOnWhichThreadsDisagree) {
  expect_complaint(
      128, "the threads of a warpgroup disagree on the group", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        if (thread_index() < 32) wgmma_commit();
        MARK start(d, descriptor_of(s->a), descriptor_of(s->b));
      });
}
TEST(AsyncMisuse, DescriptorOfAnotherSwizzle) {
  expect_complaint(
      128, "a descriptor that is not of the 128-byte swizzle", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        MARK start(d, descriptor_of(s->a) ^ uint64_t(1) << 62, descriptor_of(s->b));
      });
}
TEST(AsyncMisuse, DescriptorThatLeavesSharedMemory) {
  expect_complaint(
      128, "a descriptor leaves shared memory", +[](uint32_t*) {
        Operands* s = operands();
        MmaAccumulator d[8];
        MARK start(d, descriptor_of(s->a), descriptor_of(s->b) | 0x3FC0);
        wgmma_commit();
        wgmma_wait<0>();
      });
}

}  // namespace
}  // namespace kda::tests
