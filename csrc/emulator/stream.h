// Kernels of one stream: which run beside each other, and whose block goes on next.
//
// A kernel launched early may start once every block of the one ahead of it has called let_next_kernel_start or ended.
// The order is the worst that this allows: a block that lets the next kernel start, or raises a flag, stands still
// until nothing of a later kernel can go on. Seeded schedules choose at random. What a kernel waits for: Engine.
#pragma once
#include <atomic>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>

#include "emulator/engine.h"

namespace kda::emulator {

/// A kernel that was launched.
struct Grid {
  std::string kernel;
  dim3 size, block;
  size_t dynamic_bytes;
  std::function<void()> body;  // of one thread
  Options options;
  bool early;      // may run beside `previous`
  Grid* previous;  // null: nothing that could still run
  bool may_pause;  // something may come behind it
  uint64_t blocks, started = 0;
  std::atomic<uint64_t> ended{0};
  std::atomic<bool> has_waited{false};           // a block has called wait_for_previous_kernel
  std::vector<std::unique_ptr<Engine>> stopped;  // blocks that have started and not ended
  char done = 0;                                 // its address: for ThreadSanitizer

  bool has_ended() const { return ended.load(std::memory_order_relaxed) == blocks; }
  /// Whether the kernel behind this one may start.
  bool lets_next_start() const;
  /// The i-th block to start: odd seeds visit them backwards.
  uint3 index_of(uint64_t i) const;
};

/// Of one host thread.
class Stream {
 public:
  static Stream& current();
  ~Stream();

  /// `early`: may start before the kernel ahead has ended. Complete on return, unless within an OverlapScope.
  void launch(std::unique_ptr<Grid> grid);
  /// Runs whatever has been launched to its end. Throws Error for the first misuse, and nothing is left then.
  void finish();
  void abandon();
  int scopes = 0;

 private:
  /// What a block can do next, in the order of preference.
  enum class Step { kGoOn, kStart, kGoOnFromPause, kStartOneMore };
  /// Blocks of a kernel that OS threads share: some go on, then others start.
  struct Batch {
    Grid& grid;
    std::vector<std::unique_ptr<Engine>> stopped;
    uint64_t starts;
    bool needs_room = true;
  };

  /// An engine without a block, kept for another one, and how often all had ended before its last one did.
  struct Spare {
    std::unique_ptr<Engine> engine;
    uint64_t finishes;
  };

  std::vector<std::unique_ptr<Grid>> grids_;  // in order; those that have ended stay until all have
  std::deque<Spare> spares_;
  uint64_t finishes_ = 0;
  std::mutex mutex_;  // of spares_, Grid::stopped, failure_
  std::exception_ptr failure_;
  uint64_t random_ = 1;

  template <class Goal>
  void run_until(Goal const& goal);
  std::vector<std::pair<Grid*, Step>> possible_steps();
  void take(Grid& grid, Step step);
  void work_on(Batch& batch);
  void keep_spare(std::unique_ptr<Engine> engine);
  std::unique_ptr<Engine> engine_for(Grid const& grid);
  bool has_room(Grid const& grid);
  uint32_t random();
  [[noreturn]] void fail(std::string const& what);
  [[noreturn]] void rethrow_failure(Grid const& grid);
  [[noreturn]] void fail_deadlocked();
};

}  // namespace kda::emulator
