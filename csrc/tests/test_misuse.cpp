// Planted bugs of threads, barriers, matrices, registers: each is caught, with its place in the source.
#include "tests/misuse.h"

namespace kda::tests {
namespace {

// ---- barriers --------------------------------------------------------------------------------------------------

TEST(Misuse, BarrierThatSomeWarpsMiss) {
  expect_complaint(
      128, "96 threads: sync_block(0)", +[](uint32_t*) {
        if (thread_index() < 96) {
          MARK sync_block();
        } else {
          sync_named(1, 64);
        }
      });
}
TEST(Misuse, BarrierThatExitedThreadsMiss) {
  expect_complaint(
      128, "deadlock: every live thread waits\n    28 threads: exited\n    100 threads: sync_block(0)", +[](uint32_t*) {
        if (thread_index() >= 100) return;
        MARK sync_block();
      });
}
TEST(Misuse, BarrierReachedByPartOfAWarp) {
  expect_complaint(
      64, "barrier reached by part of warp 0", +[](uint32_t*) {
        if (thread_index() >= 16 && thread_index() < 48) {
          MARK sync_named(2, 32);
        }
      });
}
TEST(Misuse, BarrierIdOutOfRange) {
  expect_complaint(32, "barrier id 16 is not in 0..15", +[](uint32_t*) { MARK sync_named(16, 32); });
}
TEST(Misuse, BarrierCountNotOfWholeWarps) {
  expect_complaint(
      64, "barrier 1: thread count 40 is not a multiple of 32", +[](uint32_t*) { MARK sync_named(1, 40); });
}
TEST(Misuse, BarrierCountBeyondTheBlock) {
  expect_complaint(64, "barrier 1: thread count 96", +[](uint32_t*) { MARK sync_named(1, 96); });
}
TEST(Misuse, BarrierWithTwoCounts) {
  expect_complaint(
      96, "barrier 1 used with two different counts", +[](uint32_t*) {
        if (thread_index() < 32) sync_named(1, 64);
        else {
          MARK sync_named(1, 96);
        }
      });
}
TEST(Misuse, BarrierArrivedAtTwice) {
  expect_complaint(
      64, "a thread arrives twice at barrier 3", +[](uint32_t*) {
        if (thread_index() >= 32) return;
        arrive_named(3, 64);
        MARK arrive_named(3, 64);
      });
}
TEST(Misuse, BarrierThatNobodyCompletes) {
  expect_complaint(
      64, "32 threads: sync_named(1)", +[](uint32_t*) {
        if (thread_index() < 32) {
          MARK sync_named(1, 64);
        }
      });
}

/// Every step refills the buffer; without the second barrier that is wrong only where a warp runs ahead.
template <bool kSecondBarrier>
void refill(uint32_t* global) {
  KDA_DYNAMIC_SHARED(Words, s);
  uint32_t sum = 0;
  for (uint32_t step = 0; step < 6; ++step) {
    s->word[thread_index()] = step * 1000 + thread_index();
    sync_block();
    sum = sum * 3 + s->word[(thread_index() + 37 * (step + 1)) % 128];
    if (kSecondBarrier) sync_block();
  }
  global[thread_index()] = sum;
}
template <bool kSecondBarrier>
int schedules_unlike_the_first() {
  uint64_t const seed = emulator::options().seed;
  std::vector<uint32_t> first;
  int different = 0;
  for (uint64_t s = 0; s < 8; ++s) {
    emulator::options().seed = s;
    std::vector<uint32_t> out;
    EXPECT_EQ(complaint(128, &refill<kSecondBarrier>, &out), "");
    std::vector<uint32_t> values;
    for (uint32_t const x : out)
      if (x) values.push_back(x);
    if (s == 0) first = values;
    else different += values != first;
  }
  emulator::options().seed = seed;
  return different;
}
TEST(Misuse, MissingBarrierShowsInSomeSchedule) {
  EXPECT_GT(schedules_unlike_the_first<false>(), 0);
  EXPECT_EQ(schedules_unlike_the_first<true>(), 0);
}

// ---- warps -----------------------------------------------------------------------------------------------------

TEST(Misuse, DivergentWarp) {
  expect_complaint(
      32, "divergent warp: lane", +[](uint32_t* global) {
        if (thread_index() < 8) {
          global[0] = shuffle(1u, 0);
        } else {
          MARK global[1] = shuffle_xor(1u, 1);
        }
      });
}
TEST(Misuse, LanesThatExitedBeforeACollective) {
  expect_complaint(
      32, "deadlock: every live thread waits\n    20 threads: exited\n    12 threads: shuffle", +[](uint32_t* global) {
        if (thread_index() >= 12) return;
        MARK global[thread_index()] = shuffle(1u, 0);
      });
}
TEST(Misuse, WarpBarrierOfOtherLanes) {
  expect_complaint(
      32, "the calling lane is not in its own mask", +[](uint32_t*) {
        if (thread_index() == 20) {
          MARK sync_warp(0xFFFFu);
        }
      });
}
TEST(Misuse, WarpBarrierWithDifferentMasks) {
  expect_complaint(
      32, "divergent warp: lane", +[](uint32_t*) {
        if (thread_index() < 16) {
          sync_warp();
        } else {
          MARK sync_warp(0xFFFFFFFEu);
        }
      });
}

// ---- matrices and cp.async -------------------------------------------------------------------------------------

TEST(Misuse, MisalignedMatrixRows) {
  expect_complaint(
      32, "ldmatrix: row address is not a multiple of 16", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        uint32_t x[4];
        MARK ldmatrix_x4(x, &s->word[lane_index() * 4 + 1]);
      });
  expect_complaint(
      32, "stmatrix: row address is not a multiple of 16", +[](uint32_t*) {
        KDA_DYNAMIC_SHARED(Words, s);
        uint32_t const x[4] = {};
        MARK stmatrix_x4(&s->word[lane_index() * 4 + 2], x);
      });
}
TEST(Misuse, MatrixOutsideSharedMemory) {
  expect_complaint(
      32, "address is not in shared memory", +[](uint32_t* global) {
        uint32_t x[4];
        ldmatrix_x4(x, global);
      });
}
TEST(Misuse, MisalignedCopy) {
  expect_complaint(
      32, "cp.async: an address is not a multiple of 16", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK cp_async_16(&s->word[4 * lane_index()], global + 4 * lane_index() + 1);
      });
}
TEST(Misuse, CopyNeverWaitedFor) {
  expect_complaint(
      32, "cp.async copies that were never waited for, issued", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        MARK cp_async_16(&s->word[4 * lane_index()], global + 4 * lane_index());
        cp_async_commit();
      });
}
TEST(Misuse, CopyNeverWaitedForBehindAnEmptyGroup) {
  expect_complaint(
      32, "cp.async copies that were never waited for, issued", +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        cp_async_commit();
        MARK cp_async_16(&s->word[4 * lane_index()], global + 4 * lane_index());
        cp_async_commit();
      });
}
TEST(Misuse, EmptyGroupsAtTheEndAreNone) {
  EXPECT_EQ(complaint(32, +[](uint32_t*) { cp_async_commit(), cp_async_commit(), cp_async_wait<1>(); }), "");
}
TEST(Misuse, CopyReadBeforeTheWait) {
  std::vector<uint32_t> out;
  std::string const said = complaint(
      32,
      +[](uint32_t* global) {
        KDA_DYNAMIC_SHARED(Words, s);
        int const lane = lane_index();
        for (int g = 0; g < 2; ++g) {
          cp_async_16(&s->word[128 * g + 4 * lane], global + 128 * g + 4 * lane);
          cp_async_commit();
        }
        cp_async_wait<1>();
        uint32_t const first = s->word[4 * lane], second = s->word[128 + 4 * lane];  // one group too early
        cp_async_wait<0>();
        global[512 + lane] = first;
        global[544 + lane] = second;
      },
      &out);
  EXPECT_EQ(said, "");
  int poisoned = 0, read = 0;
  for (uint32_t const x : out) poisoned += x == ~0u;
  for (uint32_t const x : out) read += x == 0;
  EXPECT_EQ(poisoned, 32);
  EXPECT_EQ(read, int(out.size()) - 32);
}

// ---- shared memory ---------------------------------------------------------------------------------------------

TEST(Misuse, SharedMemoryStartsPoisoned) {
  std::vector<uint32_t> out;
  EXPECT_EQ(complaint(
                32,
                +[](uint32_t* global) {
                  KDA_DYNAMIC_SHARED(Words, dynamic);
                  KDA_SHARED(Words, object);
                  global[thread_index()] = dynamic->word[thread_index()] & object.word[thread_index()];
                },
                &out),
            "");
  int poisoned = 0;
  for (uint32_t const x : out) poisoned += x == ~0u;
  EXPECT_EQ(poisoned, 32);
}
struct TooMuch {
  char bytes[228 * 1024];
};
TEST(Misuse, SharedMemoryOverTheLimit) {
  expect_complaint(
      32, "shared memory over the limit", +[](uint32_t* global) {
        KDA_SHARED(TooMuch, s);
        global[0] = uint32_t(s.bytes[0]);
      });
  EXPECT_THROW(launch("planted", +[](int) {}, dim3(1), dim3(32), sizeof(TooMuch), nullptr, 0), emulator::Error);
}
TEST(Misuse, TooManyThreads) {
  expect_complaint(1025, "a block has 1 to 1024 threads, not 1025", +[](uint32_t*) {});
}

// ---- setmaxnreg ------------------------------------------------------------------------------------------------

TEST(Misuse, MoreRegistersThanTheBlockHas) {  // 3 x 168 before, 2 x 240 + 40 wanted
  expect_complaint(
      384, "128 threads: setmaxnreg.inc(240)", +[](uint32_t*) {
        if (thread_index() < 256) {
          MARK set_max_registers<240, true>();
        } else {
          set_max_registers<40, false>();
        }
        sync_block();
      });
}
TEST(Misuse, RegistersThatAreNeverFreed) {
  expect_complaint(
      384, "128 threads: setmaxnreg.inc(200)", +[](uint32_t*) {
        if (thread_index() < 128) {
          set_max_registers<168, true>();  // the block starts with 168
          MARK set_max_registers<200, true>();
        }
      });
}
TEST(Misuse, RegistersOfPartOfAWarpgroup) {
  expect_complaint(
      256, "96 threads: setmaxnreg.dec(40)", +[](uint32_t*) {
        if (thread_index() < 96) {
          MARK set_max_registers<40, false>();
        }
      });
}
TEST(Misuse, RegistersOfAnIncompleteWarpgroup) {
  expect_complaint(
      160, "setmaxnreg.dec 40 by an incomplete warpgroup", +[](uint32_t*) {
        if (thread_index() >= 128) {
          MARK set_max_registers<40, false>();
        }
      });
}
TEST(Misuse, RegistersInTheWrongDirection) {
  expect_complaint(
      384, "setmaxnreg.dec 232: the threads have 168 registers",
      +[](uint32_t*) { MARK set_max_registers<232, false>(); });
  expect_complaint(
      384, "setmaxnreg.inc 40: the threads have 136 registers", +[](uint32_t*) {
        set_max_registers<136, false>();
        MARK set_max_registers<40, true>();
      });
}
TEST(Misuse, RegistersOnWhichWarpsDisagree) {
  expect_complaint(
      128, "the warps of a warpgroup disagree", +[](uint32_t*) {
        if (thread_index() < 64) {
          set_max_registers<40, false>();
        } else {
          MARK set_max_registers<48, false>();
        }
      });
}

}  // namespace
}  // namespace kda::tests
