#include <algorithm>

#include "emulator/stream.h"

namespace kda::emulator {

static thread_local Engine* engine_of_os_thread = nullptr;
Engine& Engine::current() { return *engine_of_os_thread; }

Engine::Engine(int threads, size_t stack_bytes) : threads_(threads), warps_((threads_ + 31) / 32) {
  EngineOnly scope;
  window_ = static_cast<char*>(std::aligned_alloc(1024, kSharedWindow));
  fibers_.resize(size_t(threads_));
  for (Fiber& f : fibers_) f.context.allocate(stack_bytes);
  fibers += fibers_.size();
}

Engine::~Engine() {
  EngineOnly scope;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(window_, kSharedWindow);
#endif
  for (Fiber& f : fibers_) f.context.free();
  std::free(window_);
  fibers -= fibers_.size();
}

// ---- scheduling ------------------------------------------------------------------------------------------------

static KDA_NO_TSAN uint32_t nth_bit(uint32_t mask, uint32_t n) {
  while (n--) mask &= mask - 1;
  return uint32_t(__builtin_ctz(mask));
}

KDA_NO_TSAN Fiber* Engine::pick() {
  EngineOnly scope;
  bool const seeded = options_.seed != 0;
  if (seeded && !loads_.empty() && random() % 64 == 0) finish_load(random() % loads_.size());
  while (!warps_ready_) {
    if (loads_.empty() || !live_) return nullptr;
    finish_load(seeded ? random() % loads_.size() : 0);
  }
  int warp = running ? running->warp : 0;
  if (!seeded) {
    if (!ready_[warp]) {
      uint32_t const above = warp == 31 ? 0 : warps_ready_ & ~((2u << warp) - 1);
      warp = __builtin_ctz(above ? above : warps_ready_);
    }
  } else if (!ready_[warp] || schedule_ == 2 || (schedule_ == 1 && random() % 8 == 0)) {
    warp = int(nth_bit(warps_ready_, random() % uint32_t(__builtin_popcount(warps_ready_))));
  }
  uint32_t const lanes = ready_[warp];
  uint32_t const lane = seeded ? nth_bit(lanes, random() % uint32_t(__builtin_popcount(lanes))) : __builtin_ctz(lanes);
  ready_[warp] &= ~(1u << lane);
  if (!ready_[warp]) warps_ready_ &= ~(1u << warp);
  return &fibers_[size_t(warp) * 32 + lane];
}

/// Null: back to the launcher.
KDA_NO_TSAN void Engine::jump(Fiber* to) {
  Fiber* from = running;
  running = to;
  switch_context(from ? from->context : launcher_, to ? to->context : launcher_, from && from->done);
}

/// The caller has queued itself for wake-up.
KDA_NO_TSAN void Engine::block_on(char const* operation, int id, Location location) {
  running->operation = operation, running->operation_id = id, running->location = location;
  Fiber* next = pick();
  if (!next) stop_or_fail();
  else if (next != running) jump(next);
}

/// No thread can run: the block stops if another block can change that.
KDA_NO_TSAN void Engine::stop_or_fail() {
  if (outside_.empty()) fail("deadlock: every live thread waits" + who_waits_where());
  jump(nullptr);
}

KDA_NO_TSAN void Engine::thread_entry() {
  Engine& engine = current();
  finish_first_switch();
  acquire(engine.running);
  acquire(&engine.end_of_block_[(engine.blocks_ + 1) % 2]);  // the block before, in the same memory
  engine.grid_->body();
  engine.finish_thread();
}

KDA_NO_TSAN void Engine::finish_thread() {
  {
    EngineOnly scope;
    check_finished_thread();
    if (live_ == 1) check_finished_block();
  }
  running->done = true;
  --live_;
  release(&end_of_block_[blocks_ % 2]);
  release(&grid_->done);
  Fiber* next = pick();
  if (!next && live_) stop_or_fail();
  jump(next);
  std::abort();
}

KDA_NO_TSAN std::string Engine::place() const {
  char text[128];
  uint3 const thread = running ? running->thread : outside_.empty() ? uint3{} : outside_.front()->thread;
  std::snprintf(text, sizeof text, " [block %u,%u,%u thread %u,%u,%u]", block_index.x, block_index.y, block_index.z,
                thread.x, thread.y, thread.z);
  return text;
}

/// Abandons the block; go_on throws.
KDA_NO_TSAN void Engine::fail(std::string const& what) {
  {
    EngineOnly scope;
    error_ = what + place();
  }
  jump(nullptr);
  std::abort();
}

std::string Engine::who_waits_where() const {
  std::map<std::string, int> count;
  for (Fiber const& f : fibers_)
    ++count[f.done ? "exited"
                   : std::string(f.operation) + "(" + std::to_string(f.operation_id) + ") at " + f.location.text()];
  std::string text;
  for (auto const& [where, n] : count) text += "\n    " + std::to_string(n) + " threads: " + where;
  for (auto const& [at, b] : mbarriers_)
    for (uint32_t lanes : b.waiting) {
      if (!lanes) continue;
      text += "\n    the mbarrier of " + b.initialised.text() + ": " + std::to_string(b.pending) + " of " +
              std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) + " bytes outstanding";
      break;
    }
  return text;
}

void Engine::start(Grid& g, uint3 index) {
  EngineOnly scope;
  grid_ = &g, options_ = g.options, dynamic_bytes_ = g.dynamic_bytes;
  grid = g.size, block = g.block, block_index = index;
  uint64_t const hash = index.x * 0x85EBCA6Bull + index.y * 0xC2B2AE35ull + index.z + 1;
  random_ = (options_.seed * 0x9E3779B97F4A7C15ull) ^ hash;
  random(), random();
  schedule_ = int(random() % 3);
  reset_block();
  reset_shared();
}

void Engine::reset_block() {
  error_.clear();
  ++blocks_;
  live_ = threads_;
  running = nullptr;
  paused_ = lets_next_start_ = false;
  outside_.clear();
  mbarriers_.clear();
  loads_.clear();
  for (Warpgroup& g : warpgroups_) g = Warpgroup{};
  entry_registers_ = std::min(256, 65536 / (warps_ * 32) / 8 * 8);  // of a kernel with one block per multiprocessor
  for (NamedBarrier& b : barriers_) b = NamedBarrier{};
  for (auto& warp : meetings_)
    for (WarpMeeting& m : warp) m.arrived = 0;
  for (uint32_t& lanes : ready_) lanes = 0;
  warps_ready_ = 0;
  for (int i = 0; i < threads_; ++i) {
    Fiber& f = fibers_[size_t(i)];
    f.done = false, f.warp = i / 32, f.lane = i % 32, f.copies = {}, f.bulk_stores = {};
    f.thread = uint3{unsigned(i) % block.x, unsigned(i) / block.x % block.y, unsigned(i) / (block.x * block.y)};
    f.context.restart(&Engine::thread_entry);
    make_ready(f.warp, 1u << f.lane);
    release(&f);
  }
}

/// All of it poisoned.
void Engine::reset_shared() {
  statics_.clear();
  window_top_ = kDynamicOffset + (dynamic_bytes_ + 1023) / 1024 * 1024 + 1024;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(window_, kSharedWindow);
#endif
  std::memset(dynamic_shared(), 0xFF, dynamic_bytes_);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(window_, kSharedWindow);
  __asan_unpoison_memory_region(dynamic_shared(), dynamic_bytes_);
#endif
}

/// Wakes those that waited for other blocks. What they and this OS thread know of each other's memory does not change.
void Engine::go_on() {
  EngineOnly scope;
  paused_ = false;
  auto const come = std::stable_partition(outside_.begin(), outside_.end(), [&](Fiber* f) { return !has_come(*f); });
  for (auto f = come; f != outside_.end(); ++f) make_ready((*f)->warp, 1u << (*f)->lane);
  outside_.erase(come, outside_.end());
  engine_of_os_thread = this;
  launcher_.adopt_os_thread();
  jump(pick());
  engine_of_os_thread = nullptr;
  running = nullptr;
  if (!error_.empty()) throw Error(error_);
}

// ---- collectives -----------------------------------------------------------------------------------------------

/// The meeting, for the lane that completes it; null for the others, once they have been woken.
KDA_NO_TSAN WarpMeeting* Engine::meet(char const* operation, uint32_t mask, void* arguments, Location location,
                                      bool orders_memory) {
  int const warp = running->warp, lane = running->lane;
  if (!(mask >> lane & 1)) fail(std::string(operation) + ": the calling lane is not in its own mask", location);
  WarpMeeting* meeting = nullptr;
  for (WarpMeeting& m : meetings_[warp]) {
    if (m.arrived & mask && m.wanted >> lane & 1) {  // they wait for this lane, and it would wait for them
      if (m.wanted != mask || std::strcmp(m.operation, operation) != 0)
        fail("divergent warp: lane " + std::to_string(lane) + " at " + operation + " " + location.text() +
             ", others wait at " + m.operation + " " + m.location.text());
      meeting = &m;
      break;
    }
    if (!m.arrived && !meeting) meeting = &m;
  }
  if (!meeting) fail(std::string(operation) + ": more than four groups of one warp at different collectives", location);
  if (!meeting->arrived) meeting->wanted = mask, meeting->operation = operation, meeting->location = location;
  meeting->arrived |= 1u << lane;
  meeting->arguments[lane] = arguments;
  void* const sync = &meeting->sync[meeting->phase & 1];
  if (orders_memory) release(sync);
  if (meeting->arrived != meeting->wanted) {
    block_on(operation, warp, location);
    meeting = nullptr;
  } else {
    meeting->arrived = 0;
    ++meeting->phase;
  }
  if (orders_memory) acquire(sync);
  return meeting;
}

KDA_NO_TSAN void Engine::sync_warp(uint32_t mask, Location location) {
  if (meet("sync_warp", mask, nullptr, location, true)) make_ready(running->warp, mask & ~(1u << running->lane));
}

KDA_NO_TSAN void Engine::named_barrier(int id, uint32_t threads, bool wait, char const* operation, Location location) {
  if (id < 0 || id >= kNamedBarriers) fail("barrier id " + std::to_string(id) + " is not in 0..15", location);
  if (threads % 32 || !threads || threads > uint32_t(warps_) * 32)
    fail("barrier " + std::to_string(id) + ": thread count " + std::to_string(threads) +
             " is not a multiple of 32 within the block",
         location);
  NamedBarrier& b = barriers_[id];
  if (b.arrived && b.expected != threads)
    fail("barrier " + std::to_string(id) + " used with two different counts", location);
  int const warp = running->warp;
  uint32_t const bit = 1u << running->lane;
  if (b.lanes[warp] & bit) fail("a thread arrives twice at barrier " + std::to_string(id) + " in one phase", location);
  b.expected = threads;
  ++b.arrived;
  b.lanes[warp] |= bit;
  if (wait) b.waiting[warp] |= bit;
  void* sync = &b.sync[b.phase & 1];
  release(sync);
  if (b.arrived == threads) release_barrier(b, wait, location);
  else if (wait) block_on(operation, id, location);
  if (wait) acquire(sync);
}

KDA_NO_TSAN void Engine::release_barrier(NamedBarrier& b, bool wait, Location location) {
  for (int w = 0; w < warps_; ++w) {
    int const lanes_in_warp = threads_ - w * 32 < 32 ? threads_ - w * 32 : 32;
    uint32_t const all = lanes_in_warp == 32 ? ~0u : (1u << lanes_in_warp) - 1;
    if (b.lanes[w] && b.lanes[w] != all)
      fail("barrier reached by part of warp " + std::to_string(w) + " (undefined on the device)", location);
    if (w == running->warp && wait) b.waiting[w] &= ~(1u << running->lane);
    make_ready(w, b.waiting[w]);
    b.waiting[w] = b.lanes[w] = 0;
  }
  b.arrived = 0;
  ++b.phase;
}

// ---- shared memory and asynchronous copies -----------------------------------------------------------------------

KDA_NO_TSAN uint32_t Engine::shared_offset(void const* p) {
  ptrdiff_t const offset = static_cast<char const*>(p) - window_;
  if (offset < 0 || offset >= ptrdiff_t(kSharedWindow)) fail("address is not in shared memory");
  return uint32_t(offset);
}

KDA_NO_TSAN char* Engine::static_shared(void const* key, size_t bytes, size_t align) {
  EngineOnly scope;
  for (auto const& [k, p] : statics_)
    if (k == key) return p;
  size_t const at = (window_top_ + 64 + align - 1) / align * align;
  window_top_ = at + bytes;
  if (window_top_ > kSharedWindow || window_top_ - kDynamicOffset > options_.shared_limit + 4096)
    fail("shared memory over the limit");
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(window_ + at, bytes);
#endif
  std::memset(window_ + at, 0xFF, bytes);
  statics_.emplace_back(key, window_ + at);
  return window_ + at;
}

/// Poisons the destination: what is read before the covering wait is NaN.
void Engine::copy_async(Copy copy) {
  for (uint32_t i = 0; i < copy.bytes; ++i) copy.to[i] = char(0xFF);
  EngineOnly scope;
  running->copies.open.push_back(copy);
}
void Engine::commit_copies() {
  EngineOnly scope;
  CopyQueue& q = running->copies;
  q.groups.push_back(std::move(q.open));
  q.open.clear();
}
/// Lands the copies of all but the newest `keep` groups; instrumented, so that the sanitizers see the accesses.
void Engine::wait_copies(size_t keep) {
  CopyQueue& q = running->copies;
  while (q.groups.size() > keep) {
    for (Copy const& c : q.groups.front()) {
      for (uint32_t i = 0; i < c.valid; ++i) c.to[i] = c.from[i];
      for (uint32_t i = c.valid; i < c.bytes; ++i) c.to[i] = 0;
    }
    q.groups.erase(q.groups.begin());
  }
}

}  // namespace kda::emulator
