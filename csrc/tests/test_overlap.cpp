// Kernels that run beside each other: what they must wait for, and what is said or read where they do not.
#include "tests/misuse.h"
#include "tests/programs/all.h"

namespace kda::tests {
namespace {

constexpr unsigned kBlocks = 3, kThreads = 64;
constexpr uint32_t kOld = 7;  // what global memory holds at first; each kernel writes values of its own

KDA_DEVICE uint32_t index_in_grid() { return blockIdx.x * kThreads + thread_index(); }

/// Writes 100 + i after it has let the next kernel start.
void writer(uint32_t* global) {
  let_next_kernel_start();
  global[index_in_grid()] = 100 + index_in_grid();
}
/// The same, but it never lets the next kernel start.
void plain_writer(uint32_t* global) { global[index_in_grid()] = 100 + index_in_grid(); }

/// Copies what the writer wrote in another block; one thread waits for the sake of what comes behind.
template <bool kWaits>
void reader(uint32_t* global) {
  if (kWaits) wait_for_previous_kernel();
  uint32_t const i = index_in_grid(), n = kBlocks * kThreads;
  global[n + i] = global[n - 1 - i];
  wait_for_previous_kernel();
}

/// On a device of compute capability 9.0, and one stream of it.
class Overlap : public testing::Test {
 protected:
  emulator::Options const before_ = emulator::options();
  std::vector<uint32_t> memory = std::vector<uint32_t>(1024, kOld);

  Overlap() { emulator::options().has_wgmma = true; }
  ~Overlap() { emulator::options() = before_; }

  void enqueue(bool early, Kernel kernel, char const* name = "planted", unsigned blocks = kBlocks) {
    launch_early(early, name, kernel, dim3(blocks), dim3(kThreads), 0, nullptr, memory.data());
  }
  /// What the engine says of the launches in `enqueue_all`; empty: nothing.
  template <class F>
  std::string said(F enqueue_all) {
    marked_line = 0;
    try {
      OverlapScope const overlap;
      enqueue_all();
    } catch (emulator::Error const& error) {
      return error.what();
    }
    return "";
  }
  template <class F>
  void expect_silence(F enqueue_all) {
    EXPECT_EQ(said(enqueue_all), "");
  }
  /// How many of the values that `reader` copied are the writer's.
  int right_copies() const {
    int right = 0;
    for (uint32_t i = 0, n = kBlocks * kThreads; i < n; ++i) right += memory[n + i] == 100 + n - 1 - i;
    return right;
  }
};
using OverlapMisuse = Overlap;  // what is caught depends on the schedule

// ---- the end of the kernel before ------------------------------------------------------------------------------

TEST_F(Overlap, ReaderThatWaits) {
  expect_silence([&] { enqueue(false, writer), enqueue(true, reader<true>); });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}
TEST_F(OverlapMisuse, ReaderThatDoesNotWait) {
  expect_silence([&] { enqueue(false, writer), enqueue(true, reader<false>); });
  EXPECT_EQ(count_of(memory, kOld), int(memory.size() - kBlocks * kThreads));
}
/// It starts late enough, although nothing promises that it sees what was written: to ThreadSanitizer that is a race.
TEST_F(OverlapMisuse, WriterThatNeverLetsTheNextStart) {
  expect_silence([&] { enqueue(false, plain_writer), enqueue(true, reader<false>); });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}
/// One block that has neither said so nor ended keeps the next kernel from starting.
TEST_F(OverlapMisuse, OneBlockThatHoldsTheNextBack) {
  expect_silence([&] {
    enqueue(
        false, +[](uint32_t* global) {
          if (blockIdx.x != 1) let_next_kernel_start();
          else global[0] = 100;
        });
    enqueue(
        true, +[](uint32_t* global) {
          if (index_in_grid() == 0) global[1] = global[0];
          wait_for_previous_kernel();
        });
  });
  EXPECT_EQ(memory[1], 100u);
}
TEST_F(Overlap, OrdinaryLaunchesWaitForAll) {
  expect_silence([&] { enqueue(false, writer), enqueue(false, reader<false>); });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}
TEST_F(Overlap, OlderDevicesRunOneAfterTheOther) {
  emulator::options().has_wgmma = false;
  expect_silence([&] { enqueue(false, writer), enqueue(true, reader<false>); });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}
TEST_F(Overlap, CompleteOnReturnWithoutAScope) {
  enqueue(false, writer);
  EXPECT_EQ(memory[0], 100u);
  enqueue(true, reader<false>);
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}
TEST_F(Overlap, ScopesWithinAScopeEndWithIt) {
  expect_silence([&] {
    {
      OverlapScope const inner;
      enqueue(false, writer);
    }
    EXPECT_EQ(memory[0], kOld);
    enqueue(true, reader<true>);
  });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}

/// The third kernel waits for the second one, of which one block has waited for the first.
template <bool kSecondWaits>
void second_of_three(uint32_t* global) {
  let_next_kernel_start();
  if (kSecondWaits && blockIdx.x == 0) wait_for_previous_kernel();
  (void)global;
}
TEST_F(Overlap, ThirdKernelWaitsForTheFirstThroughTheSecond) {
  expect_silence([&] { enqueue(false, writer), enqueue(true, second_of_three<true>), enqueue(true, reader<true>); });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
}
TEST_F(OverlapMisuse, NobodyWaitsForTheFirstOfThree) {
  expect_said(said([&] {
                enqueue(false, writer, "first");
                enqueue(true, second_of_three<false>);
                enqueue(true, reader<true>, "third");
              }),
              "nothing behind this kernel would wait for the one before it");
}
TEST_F(OverlapMisuse, NobodyWaitsInAKernelAlone) {
  expect_said(said([&] { enqueue(true, second_of_three<false>); }),
              "nothing behind this kernel would wait for the one before it");
}

// ---- flags -----------------------------------------------------------------------------------------------------

/// Four records of a block each, announced at flags of their own. global[512 ...]: the flags.
void producer(uint32_t* global) {
  let_next_kernel_start();
  for (uint32_t record = 0; record < 4; ++record) {
    global[(blockIdx.x * 4 + record) * kThreads % 512 + thread_index()] = record;
    sync_block();
    if (thread_index() == 0) raise_flag(&global[512 + blockIdx.x * 4 + record], 1);
  }
}
/// Block b reads what producer b wrote; `kForgotten`: the record for which it does not wait.
template <int kForgotten>
void consumer(uint32_t* global) {
  for (int record = 0; record < 4; ++record) {
    uint32_t const at = blockIdx.x * 4 + record;
    if (record != kForgotten) wait_flag(&global[512 + at], kOld + 1);
    if (thread_index() == 0) global[600 + at] = global[at * kThreads % 512];
  }
  if (blockIdx.x == 0) wait_for_previous_kernel();
}
using Records = std::vector<uint32_t>;
Records records_seen(std::vector<uint32_t> const& memory) { return {&memory[600], &memory[604]}; }
TEST_F(Overlap, FlagsAcrossKernels) {
  expect_silence([&] { enqueue(false, producer, "planted", 2), enqueue(true, consumer<-1>, "planted", 2); });
  EXPECT_EQ(records_seen(memory), (Records{0, 1, 2, 3}));
}
TEST_F(OverlapMisuse, ForgottenFlags) {
  expect_silence([&] { enqueue(false, producer, "planted", 2), enqueue(true, consumer<0>, "planted", 2); });
  EXPECT_EQ(records_seen(memory), (Records{kOld, 1, 2, 3}));
  memory.assign(1024, kOld);
  expect_silence([&] { enqueue(false, producer, "planted", 2), enqueue(true, consumer<3>, "planted", 2); });
  EXPECT_EQ(records_seen(memory), (Records{0, 1, 2, kOld}));
}

/// Blocks of one kernel, each waiting for the next one.
void chain(uint32_t* global) {
  if (thread_index() == 0) {
    if (blockIdx.x + 1 < gridDim.x) wait_flag(&global[blockIdx.x + 1], kOld + 1);
    global[512 + blockIdx.x] = blockIdx.x + 1 < gridDim.x ? global[512 + blockIdx.x + 1] + 1 : 0;
  }
  sync_block();
  if (thread_index() == 0) raise_flag(&global[blockIdx.x], 1);
}
TEST_F(Overlap, FlagsAcrossBlocks) {
  for (int os_threads : {1, 2}) {
    memory.assign(1024, kOld);
    emulator::options().os_threads = os_threads;
    expect_silence([&] { enqueue(false, chain, "planted", 20); });
    EXPECT_EQ(memory[512], 19u);
  }
}
TEST_F(Overlap, MoreBlocksThanThereIsRoomFor) {
  emulator::options().most_fibers = 256;
  expect_silence([&] { enqueue(false, writer, "planted", 5), enqueue(true, reader<true>); });
  EXPECT_EQ(right_copies(), kBlocks * kThreads);
  memory.assign(1024, kOld);
  expect_silence([&] { enqueue(false, chain, "planted", 12); });
  EXPECT_EQ(memory[512], 11u);
}
TEST_F(Overlap, WithoutAScopeToo) {
  enqueue(false, chain, "planted", 5);
  EXPECT_EQ(memory[512], 4u);
}

TEST_F(OverlapMisuse, FlagThatIsNeverRaised) {
  expect_said(said([&] {
                enqueue(false, writer, "first");
                enqueue(
                    true, +[](uint32_t* global) {
                      if (blockIdx.x == 2 && thread_index() == 5) {
                        MARK wait_flag(&global[1000], kOld + 2);
                      }
                      sync_block();
                      wait_for_previous_kernel();
                    });
              }),
              "deadlock: nobody raises the flag that stands at 7 of 9");
  EXPECT_EQ(memory[0], 100u);  // all of the others went on
}
TEST_F(OverlapMisuse, FlagThatIsNeverRaisedNamesTheBlock) {
  std::string const text = said([&] {
    enqueue(
        false, +[](uint32_t* global) {
          if (blockIdx.x == 2 && thread_index() == 5) wait_flag(&global[1000], kOld + 2);
        });
  });
  EXPECT_NE(text.find("[block 2,0,0 thread 5,0,0]"), std::string::npos) << text;
}
/// A kernel that waits for one behind it: the device need not start that.
TEST_F(OverlapMisuse, FlagOfAKernelBehind) {
  expect_said(said([&] {
                enqueue(false, +[](uint32_t* global) { wait_flag(&global[1000], kOld + 1); });
                enqueue(false, +[](uint32_t* global) { raise_flag(&global[1000], 1); }, "behind");
              }),
              "deadlock: nobody raises the flag");
}

// ---- the programs that also run on a GPU --------------------------------------------------------------------------

uint32_t after_steps(uint32_t x, int steps) {
  for (int n = 0; n < steps; ++n) x = x * 1664525u + 1013904223u;
  return x;
}

TEST_F(Overlap, ProgramOfTwoKernels) {
  auto const out = overlapping_kernels();
  for (uint32_t i = 0; i < 256; ++i)
    ASSERT_EQ(out[i], after_steps(i % 64, 2000) ^ after_steps((255 - i) % 64, 2000)) << i;
}

TEST_F(Overlap, ProgramOfFlags) {
  auto const out = flags();
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t const t = i % 64, from = (i / 64 + 1) % 4;
    uint32_t sum = 0;
    for (int row = 0; row < 5; ++row) sum = sum * 3 + after_steps(from * 64 + (t ^ 33), 500 * (row + 1));
    ASSERT_EQ(out[i], sum + after_steps(3 * 64 + t, 2500)) << i;
  }
}

TEST_F(Overlap, ProgramOfPublishedNumbers) {
  auto const out = published_numbers();
  auto const own = [](uint32_t i) { return i % 64 % 7 ? float(i) / 3.f : 0.f; };
  for (uint32_t i = 0; i < 256; ++i)
    ASSERT_EQ(out[i], float_to_bits(2.f * own((i / 64 ^ 1) * 64 + (i % 64 ^ 5)) + own(i))) << i;
}

// ---- misuse that shows late ------------------------------------------------------------------------------------

TEST_F(OverlapMisuse, MisuseIsToldOfItsOwnKernel) {
  std::string const text = said([&] {
    enqueue(
        false, +[](uint32_t*) {
          let_next_kernel_start();
          if (thread_index() < 32) {
            MARK sync_named(1, 64);
          }
        });
    enqueue(true, reader<true>, "behind");
  });
  expect_said(text, "32 threads: sync_named(1)");
  expect_silence([&] { enqueue(false, writer); });  // nothing is left of it
  EXPECT_EQ(memory[0], 100u);
}
TEST_F(OverlapMisuse, ScopesLeftByAnException) {
  EXPECT_THROW(
      {
        OverlapScope const overlap;
        enqueue(false, writer);
        throw std::runtime_error("another error");
      },
      std::runtime_error);
  EXPECT_EQ(memory[0], kOld);
}

}  // namespace
}  // namespace kda::tests
