// Planted bugs of mbarriers, bulk copies and tensor maps.
#include "tests/misuse.h"

namespace kda::tests {
namespace {

using BlockKernel = void (*)(Words& s, uint32_t* global);

/// Makes barrier 0 for that many arrivals (0: none is made), which the block then knows, and goes on with `body`.
void planted_kernel(uint32_t* global, uint32_t arrivals, BlockKernel body) {
  KDA_DYNAMIC_SHARED(Words, s);
  if (arrivals && thread_index() == 0) {
    mbarrier_init(s->barrier[0], arrivals);
    fence_mbarrier_init();
  }
  if (arrivals) sync_block();
  body(*s, global);
}

class AsyncMisuse : public testing::Test {
 protected:
  uint32_t arrivals = 1;      // at barrier 0; 0: none is made, as a block of one thread needs
  std::vector<uint32_t> out;  // global memory afterwards

  std::string said(unsigned threads, BlockKernel body) {
    out.clear();
    return complaint(threads, planted_kernel, &out, arrivals, body);
  }
  void expect(std::string const& text, BlockKernel body, unsigned threads = 32) {
    expect_said(said(threads, body), text, __FILE__);
  }
};

// ---- mbarriers -------------------------------------------------------------------------------------------------

TEST_F(AsyncMisuse, BarrierNeverInitialised) {
  arrivals = 0;
  expect(
      "mbarrier.arrive: the mbarrier was never initialised",
      +[](Words& s, uint32_t*) { MARK mbarrier_arrive(s.barrier[0]); });
  expect(
      "mbarrier.try_wait: the mbarrier was never initialised",
      +[](Words& s, uint32_t*) { MARK mbarrier_wait(s.barrier[1], 0); });
}
TEST_F(AsyncMisuse, BarrierInitialisedTwice) {
  expect("of a barrier that was initialised at", +[](Words& s, uint32_t*) { MARK mbarrier_init(s.barrier[0], 1); });
}
TEST_F(AsyncMisuse, BarrierOverwritten) {
  expect(
      "was overwritten; found", +[](Words& s, uint32_t*) {
        s.barrier[0].word = 5;
        MARK mbarrier_arrive(s.barrier[0]);
      });
}
TEST_F(AsyncMisuse, BarrierCountZero) {
  arrivals = 0;
  expect("mbarrier.init: count 0", +[](Words& s, uint32_t*) { MARK mbarrier_init(s.barrier[0], 0); });
}
TEST_F(AsyncMisuse, TooManyArrivals) {
  expect(
      "more than 1 arrivals in one phase", +[](Words& s, uint32_t*) {
        if (thread_index() != 0) return;
        mbarrier_arrive_expect_tx(s.barrier[0], 16);
        MARK mbarrier_arrive(s.barrier[0]);
      });
}
TEST_F(AsyncMisuse, TooFewArrivals) {
  arrivals = 33;
  expect(
      "1 of 33 arrivals and 0 bytes outstanding",
      +[](Words& s, uint32_t*) {
        if (thread_index() < 32) mbarrier_arrive(s.barrier[0]);
        else {
          MARK mbarrier_wait(s.barrier[0], 0);
        }
      },
      64);
}
TEST_F(AsyncMisuse, ParityThatIsNone) {
  expect("parity 2 is neither 0 nor 1", +[](Words& s, uint32_t*) { MARK mbarrier_wait(s.barrier[0], 2); });
}

// ---- loads -----------------------------------------------------------------------------------------------------

/// Expects kExpected bytes, loads 64, waits.
template <int kExpected>
void load_expecting(Words& s, uint32_t* global) {
  if (thread_index() == 0) {
    mbarrier_arrive_expect_tx(s.barrier[0], kExpected);
    bulk_load(s.word, global, 64, s.barrier[0]);
  }
  MARK mbarrier_wait(s.barrier[0], 0);
}
TEST_F(AsyncMisuse, MoreBytesExpectedThanLoaded) {
  expect("0 of 1 arrivals and 16 bytes outstanding", &load_expecting<80>);
}
TEST_F(AsyncMisuse, FewerBytesExpectedThanLoaded) {
  expect("0 of 1 arrivals and -16 bytes outstanding", &load_expecting<48>);
}
TEST_F(AsyncMisuse, NothingExpected) {
  arrivals = 0;
  expect(
      "expected bytes and arrived bytes differ by -64", +[](Words& s, uint32_t* global) {
        if (thread_index() != 0) return;
        mbarrier_init(s.barrier[1], 1);
        MARK mbarrier_init(s.barrier[0], 1);
        bulk_load(s.word, global, 64, s.barrier[0]);
        mbarrier_arrive_expect_tx(s.barrier[1], 64);
        bulk_load(s.word + 16, global, 64, s.barrier[1]);
        mbarrier_wait(s.barrier[1], 0);  // the first one has landed by then
      });
}
TEST_F(AsyncMisuse, LoadNeverWaitedFor) {
  expect(
      "bulk copy", +[](Words& s, uint32_t* global) {
        if (thread_index() == 0) {
          mbarrier_arrive_expect_tx(s.barrier[0], 64);
          MARK bulk_load(s.word, global, 64, s.barrier[0]);
        }
      });
}
TEST_F(AsyncMisuse, PhaseThatNobodyWaitedFor) {
  expect(
      "nobody waited for the bulk copy issued", +[](Words& s, uint32_t* global) {
        if (thread_index() == 0) mbarrier_init(s.barrier[1], 1);
        if (thread_index() != 0) return;
        mbarrier_arrive_expect_tx(s.barrier[0], 64);
        MARK bulk_load(s.word, global, 64, s.barrier[0]);
        mbarrier_arrive_expect_tx(s.barrier[1], 64);
        bulk_load(s.word + 16, global, 64, s.barrier[1]);
        mbarrier_wait(s.barrier[1], 0);  // the other one
      });
}
TEST_F(AsyncMisuse, LoadReadBeforeTheWait) {
  EXPECT_EQ(said(
                32,
                +[](Words& s, uint32_t* global) {
                  if (thread_index() == 0) {
                    mbarrier_arrive_expect_tx(s.barrier[0], 128);
                    bulk_load(s.word, global, 128, s.barrier[0]);
                  }
                  sync_warp();
                  uint32_t const early = s.word[thread_index()];
                  mbarrier_wait(s.barrier[0], 0);
                  global[64 + thread_index()] = early;
                }),
            "");
  EXPECT_EQ(count_of(out, ~0u), 32);
}
TEST_F(AsyncMisuse, LoadWithoutABarrier) {
  arrivals = 0;
  expect(
      "cp.async.bulk: the mbarrier was never initialised",
      +[](Words& s, uint32_t* global) { MARK bulk_load(s.word, global, 64, s.barrier[0]); });
}
TEST_F(AsyncMisuse, MisalignedBulkCopy) {
  expect(
      "an address or the size is not a multiple of 16",
      +[](Words& s, uint32_t* global) { MARK bulk_load(s.word, global, 72, s.barrier[0]); });
  expect(
      "an address or the size is not a multiple of 16",
      +[](Words& s, uint32_t* global) { MARK bulk_store(global + 1, s.word, 64); });
}

// ---- stores ----------------------------------------------------------------------------------------------------

TEST_F(AsyncMisuse, StoreNeverCommitted) {
  expect(
      "bulk store that was never committed, issued", +[](Words& s, uint32_t* global) {
        s.word[thread_index()] = 1;
        sync_warp();
        if (thread_index() != 0) return;
        MARK bulk_store(global, s.word, 128);
      });
}
TEST_F(AsyncMisuse, ExitWhileAStoreReads) {
  expect(
      "exits while a bulk store may still read its shared memory, issued", +[](Words& s, uint32_t* global) {
        s.word[thread_index()] = 1;
        sync_warp();
        if (thread_index() != 0) return;
        MARK bulk_store(global, s.word, 128);
        bulk_store_commit();
      });
}
/// Stores four words, and after `wait` overwrites the first.
template <class Wait>
void reuse_after(Words& s, uint32_t* global) {
  for (int i = 0; i < 4; ++i) s.word[i] = 100;
  bulk_store(global, s.word, 16);
  bulk_store_commit();
  Wait{}();
  s.word[0] = 7;
  bulk_store_wait<0>();
}
struct NoWait {
  void operator()() const {}
};
template <int kPending>
struct WaitRead {
  void operator()() const { bulk_store_wait_read<kPending>(); }
};
TEST_F(AsyncMisuse, ReuseBeforeAStoreHasRead) {
  arrivals = 0;
  EXPECT_EQ(said(1, &reuse_after<NoWait>), "");
  EXPECT_EQ(count_of(out, 7), 1);
  EXPECT_EQ(said(1, &reuse_after<WaitRead<1>>), "");
  EXPECT_EQ(count_of(out, 7), 1);
  EXPECT_EQ(said(1, &reuse_after<WaitRead<0>>), "");
  EXPECT_EQ(count_of(out, 7), 0);
}
TEST_F(AsyncMisuse, GlobalMemoryReadBeforeTheStoreIsDone) {
  arrivals = 0;
  EXPECT_EQ(said(
                1,
                +[](Words& s, uint32_t* global) {
                  for (int i = 0; i < 4; ++i) s.word[i] = 100;
                  bulk_store(global, s.word, 16);
                  bulk_store_commit();
                  bulk_store_wait_read<0>();
                  uint32_t const early = global[1];
                  bulk_store_wait<0>();
                  global[8] = early;
                }),
            "");
  EXPECT_EQ(count_of(out, ~0u), 1);
}

// ---- tensor maps -----------------------------------------------------------------------------------------------

/// A map of 16 x 64 bf16 at `global`.
TensorMap map_of(uint32_t* global, TensorSwizzle swizzle = TensorSwizzle::kNone) {
  return make_tensor_map<Bf16, 2>(reinterpret_cast<Bf16*>(global), {64, 16}, {64}, {64, 8}, swizzle);
}
TEST_F(AsyncMisuse, TensorCopyOfAnotherRank) {
  expect(
      "cp.async.bulk.tensor: the map has another rank", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        MARK tensor_load(s.word, map, {0, 0, 0}, s.barrier[0]);
      });
  expect(
      "cp.async.bulk.tensor: the map has another rank", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        MARK tensor_store(map, {0, 0, 0}, s.word);
      });
}
TEST_F(AsyncMisuse, MisalignedTensorCopy) {
  expect(
      "not a multiple of 128 bytes", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        MARK tensor_load(s.word + 16, map, {0, 0}, s.barrier[0]);
      });
  expect(
      "not a multiple of 1024 bytes (128-byte swizzle)", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global, TensorSwizzle::k128B);
        MARK tensor_load(s.word + 32, map, {0, 0}, s.barrier[0]);
      });
}
TEST_F(AsyncMisuse, TensorCopyAtAMisalignedCoordinate) {
  expect(
      "the first coordinate is not a multiple of 16 bytes", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        MARK tensor_load(s.word, map, {4, 0}, s.barrier[0]);
      });
  expect(
      "the first coordinate is not a multiple of 16 bytes", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        MARK tensor_store(map, {3, 0}, s.word);
      });
}
TEST_F(AsyncMisuse, TensorStoreThatIsCutWhereItMayNot) {
  expect(
      "a store at a negative coordinate", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        MARK tensor_store(map, {0, -2}, s.word);
      });
  expect(
      "a store's row ends inside a piece of 16 bytes", +[](Words& s, uint32_t* global) {
        auto const odd =
            make_tensor_map<Bf16, 2>(reinterpret_cast<Bf16*>(global), {37, 16}, {64}, {32, 8}, TensorSwizzle::kNone);
        MARK tensor_store(odd, {8, 0}, s.word);
      });
}
TEST_F(AsyncMisuse, TensorBytesCountedWithoutThePartBeyondTheBorder) {
  expect(
      "0 of 1 arrivals and -512 bytes outstanding", +[](Words& s, uint32_t* global) {
        TensorMap const map = map_of(global);
        if (thread_index() == 0) {
          mbarrier_arrive_expect_tx(s.barrier[0], 512);  // four of the eight rows are inside
          tensor_load(s.word, map, {0, 12}, s.barrier[0]);
        }
        MARK mbarrier_wait(s.barrier[0], 0);
      });
}

}  // namespace
}  // namespace kda::tests
