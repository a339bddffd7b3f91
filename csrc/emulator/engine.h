// Runs the threads of one CUDA block as fibers.
//
// A fiber runs until it reaches a collective (shuffle, mma, barrier, ...); there it waits for the others. Which fiber
// runs next is the schedule's choice (Options::seed). Copies are asynchronous in earnest: they take effect at the wait
// that covers them, and until then their destination is poisoned. A block stops where all of it waits for other blocks
// (a flag, the end of the kernel before), and where the kernel behind it may run first; stream.h lets it go on.
//
// Not modelled, so to be proven on a GPU: proxy fences (fence.proxy.async, fence.mbarrier_init, wgmma.fence), how many
// blocks the device has room for (a block may wait for one that has yet to start), memory that becomes visible late (a
// flag counts at once; missing release or acquire is a race that ThreadSanitizer finds), kernels of other streams,
// clusters, speed.
#pragma once
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulator/context.h"
#include "vector_types.h"

namespace kda::emulator {

/// Where in a kernel's source a collective stands.
struct Location {
  char const* file;
  int line;
  static constexpr Location here(char const* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

/// What a kernel did wrong; thrown by launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  uint64_t seed = 0;  // 0: threads in ascending order; otherwise a random schedule of this seed
  int os_threads = 1;
  size_t stack_bytes = 256 * 1024;
#if defined(__SANITIZE_THREAD__)
  size_t most_fibers = 1536;  // of blocks that have begun
#else
  size_t most_fibers = 16384;  // each is two mappings of memory, of the 65530 that Linux allows
#endif
  size_t shared_limit = 227 * 1024;
  bool has_wgmma = false;
  int multiprocessors = 1;
  int64_t small_workspace = 512 * 1024;  // so that small tests, too, work in parts
  int wanted_segments = 4;               // and with sequences split
  int64_t device_memory = int64_t(128) << 30;
  bool skip_launches = false;  // a launch does nothing: what is left is the host's work (bench_host_overhead.py)
};
inline Options& options() {
  static Options o;
  return o;
}

inline constexpr size_t kSharedWindow = 256 * 1024;
inline constexpr int kMaxWarps = 32, kNamedBarriers = 16;

struct Copy {
  char* to;
  char const* from;
  uint32_t bytes, valid;  // the rest is zero-filled
  Location location{"", 0};
};
struct CopyQueue {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  /// Of those on their way; null: none, whatever groups of nothing there are.
  Copy const* first() const {
    for (auto const& group : groups)
      if (!group.empty()) return &group.front();
    return open.empty() ? nullptr : &open.front();
  }
};

/// A bulk copy: its pieces, one per run of bytes that are neighbours on both sides.
struct BulkLoad {
  std::vector<Copy> pieces;
  uint32_t bytes;    // that the barrier counts: zero-filled ones too
  uint32_t barrier;  // shared offset
  Location location;
};
/// Reads shared memory into `staged` and then writes it, both as late as the kernel's waits allow.
struct BulkStore {
  std::vector<Copy> pieces;
  std::vector<char> staged;
  bool read = false;
  Location location;
};
struct BulkStoreQueue {
  std::vector<BulkStore> open;
  std::vector<std::vector<BulkStore>> groups;
};

struct Fiber {
  Context context;
  bool done = true;
  uint3 thread{};
  int warp = 0, lane = 0;
  char const* operation = "";  // where it is blocked
  int operation_id = 0;
  Location location{"", 0};
  CopyQueue copies;
  BulkStoreQueue bulk_stores;
  uint32_t const* flag = nullptr;  // that has to count `flag_count`; null: waits for the kernel before
  uint32_t flag_count = 0;
};

/// Lanes of one warp on their way into one collective.
struct WarpMeeting {
  uint32_t wanted = 0, arrived = 0;
  char const* operation = "";
  Location location{"", 0};
  void* arguments[32];
  uint64_t sync[2] = {};  // as in NamedBarrier
  uint32_t phase = 0;
};

/// One thread's part of a warpgroup product, as started.
struct Wgmma {
  int n;
  bool a_mn_major, b_mn_major, accumulate;
  uint64_t a_descriptor, b_descriptor;
  uint32_t const* a;  // four registers; null: A comes from shared memory
  float* d;
  float (*value)(uint16_t);
};
/// The warpgroup's product on its way: executed at the first wait that covers it.
struct PendingWgmma {
  Wgmma shape;  // of lane 0; `a` and `d` are per thread below
  int group;
  bool done;
  uint32_t a[128][4];
  float* d[128];  // the true accumulators, in Warpgroup::accumulators
  Location location;
};
struct InFlight {
  std::vector<float> value;
  int group;
  Location location{"", 0};
};
struct Warpgroup {
  uint32_t arrived = 0;
  uint32_t waiting[4] = {};
  Wgmma arguments[128];
  std::vector<PendingWgmma> pending;
  int commits[128] = {};
  std::map<float*, InFlight> accumulators[128];  // in flight; the kernel's own registers hold NaN meanwhile
  int registers = 0;                             // per thread, by setmaxnreg; 0: as the block started
  int registers_wanted = 0;                      // by the setmaxnreg in progress; 0: none
  uint32_t registers_arrived = 0;
  uint32_t registers_waiting[4] = {};
};

/// Synchronisation objects alternate with the phase: a thread already in the next phase must not leak order into this.
struct NamedBarrier {
  uint64_t sync[2] = {};
  uint32_t phase = 0, expected = 0, arrived = 0;
  uint32_t lanes[kMaxWarps] = {}, waiting[kMaxWarps] = {};
};

/// An mbarrier; the word in shared memory only says that there is one. A phase ends when no arrival and no byte is
/// outstanding. Two synchronisation objects, for the reason given at NamedBarrier.
struct MbarrierState {
  uint64_t sync[2] = {};
  uint32_t count = 0, pending = 0;
  uint32_t phase = 0;  // parity of the phase in progress
  int64_t bytes = 0;   // expected and not yet arrived
  uint32_t waiting[kMaxWarps] = {};
  bool loads = false;       // a bulk copy has arrived in the phase in progress
  bool unobserved = false;  // the last phase had bulk copies, and nobody has waited for it
  Location initialised{"", 0}, last_load{"", 0}, unobserved_load{"", 0};
};

struct Grid;

class Engine {
 public:
  /// Of this OS thread. Not inline: a fiber may go on in another one, and a compiler keeps addresses of thread-locals.
  static KDA_NO_TSAN Engine& current();

  Engine(int threads, size_t stack_bytes);
  Engine(Engine const&) = delete;
  ~Engine();
  int threads() const { return threads_; }
  static inline std::atomic<size_t> fibers{0};  // of all engines

  // What a stream sees. A block starts; then go_on runs it until it has ended or stops, throws Error for a misuse.
  void start(Grid& grid, uint3 index);
  void go_on();
  bool has_ended() const { return live_ == 0; }
  bool is_paused() const { return paused_; }
  /// Not paused, and what a thread waits for has come.
  bool can_go_on() const;
  bool lets_next_start() const { return lets_next_start_; }
  bool waits_for_flag() const;
  /// What to say if nothing else can go on either.
  std::string deadlock() const;

  // What a kernel sees.
  dim3 grid, block;
  uint3 block_index{};
  Fiber* running = nullptr;
  KDA_NO_TSAN char* dynamic_shared() { return window_ + kDynamicOffset; }
  KDA_NO_TSAN char* static_shared(void const* key, size_t bytes, size_t align);
  KDA_NO_TSAN uint32_t shared_offset(void const* p);

  [[noreturn]] KDA_NO_TSAN void fail(std::string const& what);
  [[noreturn]] KDA_NO_TSAN void fail(std::string const& what, Location at) { fail(what + " at " + at.text()); }

  /// Every lane of `mask` arrives with its arguments; the last one runs `exchange` over all of them.
  template <class A>
  KDA_NO_TSAN void warp_collective(char const* operation, uint32_t mask, A* arguments, void (*exchange)(A**, uint32_t),
                                   Location location) {
    if (WarpMeeting* m = meet(operation, mask, arguments, location)) {
      if (exchange) exchange(reinterpret_cast<A**>(m->arguments), mask);
      make_ready(running->warp, mask & ~(1u << running->lane));
    }
  }
  KDA_NO_TSAN void sync_warp(uint32_t mask, Location location);
  KDA_NO_TSAN void named_barrier(int id, uint32_t threads, bool wait, char const* operation, Location location);

  KDA_NO_TSAN void start_wgmma(Wgmma const& x, Location location);
  KDA_NO_TSAN void commit_wgmma();
  void wait_wgmma(int keep);
  KDA_NO_TSAN void set_registers(int count, bool more, Location location);

  void copy_async(Copy copy);
  void commit_copies();
  void wait_copies(size_t keep);

  void init_mbarrier(uint64_t& word, uint32_t count, Location location);
  void arrive_mbarrier(uint64_t const& word, uint32_t expected_bytes, Location location);
  void wait_mbarrier(uint64_t const& word, uint32_t parity, Location location);
  void start_bulk_load(BulkLoad load, uint64_t const& word);
  void start_bulk_store(BulkStore store);
  void commit_bulk_stores();
  /// `written`: until the writes are done too, not just the reads of shared memory.
  void wait_bulk_stores(size_t keep, bool written);

  void let_next_kernel_start();
  void wait_for_previous_kernel(Location location);
  void raise_flag(uint32_t* flag, uint32_t count);
  void set_flag(uint32_t* flag, uint32_t value);
  void wait_flag(uint32_t const* flag, uint32_t count, Location location);

 private:
  static constexpr size_t kDynamicOffset = 1024;
  Options options_;
  Grid* grid_ = nullptr;
  int threads_, warps_, live_ = 0;
  size_t dynamic_bytes_ = 0, window_top_ = 0;
  std::vector<Fiber*> outside_;  // that wait for other blocks
  bool paused_ = false, lets_next_start_ = false;
  uint32_t blocks_ = 0;            // that were run here, one after the other
  uint64_t end_of_block_[2] = {};  // synchronisation objects, by turns: a thread knows of the block before alone
  std::vector<Fiber> fibers_;
  Context launcher_;
  char* window_ = nullptr;  // the block's shared memory
  std::vector<std::pair<void const*, char*>> statics_;
  uint32_t ready_[kMaxWarps] = {}, warps_ready_ = 0;
  WarpMeeting meetings_[kMaxWarps][4];
  NamedBarrier barriers_[kNamedBarriers];
  Warpgroup warpgroups_[kMaxWarps / 4];
  std::map<uint32_t, MbarrierState> mbarriers_;  // by shared offset
  std::vector<BulkLoad> loads_;                  // on their way
  int entry_registers_ = 0;                      // per thread, when the block starts
  std::string error_;
  uint64_t random_ = 1;
  int schedule_ = 0;  // 0: a warp runs as far as it can; 1: sometimes another; 2: any

  KDA_NO_TSAN uint32_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return uint32_t(random_ >> 32);
  }
  KDA_NO_TSAN void make_ready(int warp, uint32_t lanes) {
    if (lanes) ready_[warp] |= lanes, warps_ready_ |= 1u << warp;
  }
  void reset_block();
  void reset_shared();
  KDA_NO_TSAN Fiber* pick();
  KDA_NO_TSAN void stop_or_fail();
  KDA_NO_TSAN void pause();
  KDA_NO_TSAN void wait_outside(uint32_t const* flag, uint32_t count, char const* operation, Location location);
  KDA_NO_TSAN bool has_come(Fiber const& fiber) const;
  KDA_NO_TSAN std::string place() const;
  KDA_NO_TSAN void jump(Fiber* to);
  KDA_NO_TSAN void block_on(char const* operation, int id, Location location);
  KDA_NO_TSAN WarpMeeting* meet(char const* operation, uint32_t mask, void* arguments, Location location,
                                bool orders_memory = false);
  KDA_NO_TSAN void release_barrier(NamedBarrier& barrier, bool wait, Location location);
  KDA_NO_TSAN void issue_wgmma(Warpgroup& group, Location location);
  KDA_NO_TSAN PendingWgmma* due_wgmma(Warpgroup& group, size_t i, int before);
  void run_wgmma(PendingWgmma& op);
  KDA_NO_TSAN MbarrierState& mbarrier(uint64_t const& word, char const* operation, Location location);
  KDA_NO_TSAN void complete_phase(MbarrierState& barrier);
  KDA_NO_TSAN void finish_load(size_t i);
  KDA_NO_TSAN void grant_registers();
  KDA_NO_TSAN void check_finished_thread();
  KDA_NO_TSAN void check_finished_block();
  KDA_NO_TSAN void finish_thread();
  std::string who_waits_where() const;
  static KDA_NO_TSAN void thread_entry();
};

/// Byte address of element (n, k) of B, or (m, k) of A. PTX ISA, canonical layouts with the 128-byte swizzle: K-major
/// rows of n hold 64 values of k; MN-major rows of k hold 64 values of n.
KDA_NO_TSAN uint32_t wgmma_element_address(uint64_t descriptor, int n, int k, bool mn_major);

/// Within it kernels overlap as on a device; at its end all of them have run.
class OverlapScope {
 public:
  OverlapScope();
  OverlapScope(OverlapScope const&) = delete;
  ~OverlapScope() noexcept(false);  // throws Error for the first misuse

 private:
  int const exceptions_;  // on their way when it began
};

/// Launches a kernel whose threads run `body`. Without an OverlapScope it has run on return. Throws Error for the first
/// misuse, of this kernel or one before it. Records `kernel` as having run.
void run_grid(char const* kernel, bool early, dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body);

}  // namespace kda::emulator
