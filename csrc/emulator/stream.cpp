#include "emulator/stream.h"

#include <algorithm>
#include <thread>

namespace kda::emulator {

namespace {
#if defined(__SANITIZE_THREAD__)
// To ThreadSanitizer a thread of a later block is the one that it was before, ordered after all that it did then:
// blocks that can run beside each other have threads of their own while there are few (each is 0.8 MB and 1 ms).
constexpr bool kNeedsOwnThreads = true;
#else
constexpr bool kNeedsOwnThreads = false;
#endif
constexpr size_t kMostSpareFibers = 4096;

size_t threads_of(Grid const& grid) { return size_t(grid.block.x) * grid.block.y * grid.block.z; }
}  // namespace

bool Grid::lets_next_start() const {
  return started == blocks && std::all_of(stopped.begin(), stopped.end(), [](auto& e) { return e->lets_next_start(); });
}

uint3 Grid::index_of(uint64_t i) const {
  uint64_t const k = options.seed & 1 ? blocks - 1 - i : i;
  return {unsigned(k % size.x), unsigned(k / size.x % size.y), unsigned(k / size.x / size.y)};
}

Stream& Stream::current() {
  static thread_local Stream stream;
  return stream;
}

Stream::~Stream() {
  EngineOnly scope;
  grids_.clear(), spares_.clear();
}

void Stream::abandon() {
  EngineOnly scope;
  grids_.clear();
}

uint32_t Stream::random() {
  random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
  return uint32_t(random_ >> 32);
}

void Stream::fail(std::string const& what) {
  abandon();
  throw Error(what);
}

OverlapScope::OverlapScope() : exceptions_(std::uncaught_exceptions()) { ++Stream::current().scopes; }
OverlapScope::~OverlapScope() noexcept(false) {
  Stream& stream = Stream::current();
  if (--stream.scopes > 0) return;
  if (std::uncaught_exceptions() > exceptions_) stream.abandon();
  else stream.finish();
}

// ---- launches --------------------------------------------------------------------------------------------------

void Stream::launch(std::unique_ptr<Grid> grid) {
  size_t const threads = threads_of(*grid);
  if (threads < 1 || threads > 1024)
    fail(grid->kernel + ": a block has 1 to 1024 threads, not " + std::to_string(threads));
  if (grid->dynamic_bytes > grid->options.shared_limit) fail(grid->kernel + ": dynamic shared memory over the limit");
  uint64_t const seed = grid->options.seed;
  if (grids_.empty()) random_ = seed * 0x9E3779B97F4A7C15ull + 1;
  bool const beside = grid->early && !(seed && random() % 4 == 0);  // a device need not start it early
  if (!beside) finish();
  if (!grids_.empty()) run_until([&] { return grids_.back()->lets_next_start(); });
  grid->previous = grids_.empty() ? nullptr : grids_.back().get();
  grid->may_pause = scopes > 0;
  grids_.push_back(std::move(grid));
  if (!scopes) finish();
}

void Stream::finish() {
  if (grids_.empty()) return;
  run_until([&] { return std::all_of(grids_.begin(), grids_.end(), [](auto& g) { return g->has_ended(); }); });
  for (auto const& grid : grids_) acquire(&grid->done);
  grids_.clear();
  ++finishes_;
}

// ---- whose turn it is ------------------------------------------------------------------------------------------

template <class Goal>
void Stream::run_until(Goal const& goal) {
  while (!goal()) {
    auto const steps = possible_steps();
    if (steps.empty()) fail_deadlocked();
    bool const seeded = grids_.back()->options.seed != 0;
    auto const [grid, step] = steps[seeded ? random() % steps.size() : 0];
    take(*grid, step);
  }
}

/// Of later kernels first.
std::vector<std::pair<Grid*, Stream::Step>> Stream::possible_steps() {
  std::vector<std::pair<Grid*, Step>> steps;
  auto const add = [&](Step step, auto const& possible) {
    for (size_t i = grids_.size(); i-- > 0;)
      if (possible(*grids_[i])) steps.emplace_back(grids_[i].get(), step);
  };
  auto const any = [](Grid& g, auto const& which) { return std::any_of(g.stopped.begin(), g.stopped.end(), which); };
  add(Step::kGoOn, [&](Grid& g) { return any(g, [](auto& e) { return e->can_go_on(); }); });
  add(Step::kStart, [&](Grid& g) { return g.started < g.blocks && has_room(g); });
  add(Step::kGoOnFromPause, [&](Grid& g) { return any(g, [](auto& e) { return e->is_paused(); }); });
  if (steps.empty()) add(Step::kStartOneMore, [](Grid& g) { return g.started < g.blocks; });
  return steps;
}

/// One that waits has its stacks and shared memory meanwhile; a device, too, has room for so many only.
bool Stream::has_room(Grid const& grid) {
  size_t fibers = threads_of(grid);
  for (auto const& g : grids_) fibers += g->stopped.size() * threads_of(*g);
  return fibers <= grid.options.most_fibers;
}

void Stream::fail_deadlocked() {
  for (bool const by_flag : {true, false})  // rather than those that wait for the kernel that waits
    for (auto const& grid : grids_)
      for (auto const& engine : grid->stopped)
        if (engine->waits_for_flag() == by_flag) fail(grid->kernel + ": " + engine->deadlock());
  fail("deadlock");
}

// ---- blocks over OS threads ------------------------------------------------------------------------------------

void Stream::take(Grid& grid, Step step) {
  Batch batch{grid, {}, 0};
  if (step == Step::kStart) batch.starts = grid.blocks - grid.started;
  if (step == Step::kStartOneMore) batch.starts = 1, batch.needs_room = false;
  size_t const os_threads = size_t(std::max(1, grid.options.os_threads));
  size_t const most = step == Step::kGoOn ? grid.stopped.size() : step == Step::kGoOnFromPause ? os_threads : 0;
  std::vector<std::unique_ptr<Engine>> others;
  for (auto& e : grid.stopped) {
    bool const can = step == Step::kGoOnFromPause ? e->is_paused() : e->can_go_on();
    (can && batch.stopped.size() < most ? batch.stopped : others).push_back(std::move(e));
  }
  grid.stopped = std::move(others);
  std::reverse(batch.stopped.begin(), batch.stopped.end());  // taken from the back

  size_t const threads = std::min<size_t>(os_threads, batch.stopped.size() + batch.starts);
  if (threads <= 1) {
    work_on(batch);
  } else {
    std::vector<std::thread> workers;
    for (size_t i = 0; i < threads; ++i) workers.emplace_back([&] { work_on(batch); });
    for (std::thread& worker : workers) worker.join();
  }
  if (failure_) rethrow_failure(grid);
  if (grid.early && grid.has_ended() && !grid.has_waited)
    fail(grid.kernel + ": nothing behind this kernel would wait for the one before it: it was launched early, and no " +
         "thread of it calls wait_for_previous_kernel");
}

/// Until nothing of the batch is left.
void Stream::work_on(Batch& batch) {
  Grid& grid = batch.grid;
  try {
    for (;;) {
      std::unique_ptr<Engine> engine;
      uint64_t begun = 0;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (failure_) return;
        if (!batch.stopped.empty()) {
          engine = std::move(batch.stopped.back());
          batch.stopped.pop_back();
        } else if (batch.starts == 0 || (batch.needs_room && !has_room(grid))) {
          return;
        } else {
          --batch.starts, begun = grid.started++;
        }
      }
      if (!engine) (engine = engine_for(grid))->start(grid, grid.index_of(begun));
      engine->go_on();
      std::lock_guard<std::mutex> lock(mutex_);
      if (engine->has_ended()) {
        grid.ended.fetch_add(1, std::memory_order_relaxed);
        keep_spare(std::move(engine));
      } else {
        grid.stopped.push_back(std::move(engine));
      }
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

void Stream::rethrow_failure(Grid const& grid) {
  std::string const kernel = grid.kernel;
  abandon();
  try {
    std::rethrow_exception(std::exchange(failure_, nullptr));
  } catch (Error const& e) {
    throw Error(kernel + ": " + e.what());
  }
}

/// The oldest ones give way.
void Stream::keep_spare(std::unique_ptr<Engine> engine) {
  EngineOnly scope;
  spares_.push_back({std::move(engine), finishes_});
  size_t fibers = 0;
  for (Spare const& spare : spares_) fibers += size_t(spare.engine->threads());
  for (; fibers > kMostSpareFibers; spares_.pop_front()) fibers -= size_t(spares_.front().engine->threads());
}

std::unique_ptr<Engine> Stream::engine_for(Grid const& grid) {
  EngineOnly scope;
  std::lock_guard<std::mutex> lock(mutex_);
  int const threads = int(threads_of(grid));
  auto const take_spare = [&](bool any) -> std::unique_ptr<Engine> {
    for (auto spare = spares_.begin(); spare != spares_.end(); ++spare)
      if (spare->engine->threads() == threads && (any || spare->finishes != finishes_)) {
        std::unique_ptr<Engine> engine = std::move(spare->engine);
        spares_.erase(spare);
        return engine;
      }
    return nullptr;
  };
  auto const has_room = [&] { return Engine::fibers + size_t(threads) <= grid.options.most_fibers; };
  if (auto engine = take_spare(!kNeedsOwnThreads)) return engine;
  if (!has_room())
    if (auto engine = take_spare(true)) return engine;
  while (kNeedsOwnThreads && !spares_.empty() && !has_room()) spares_.pop_front();
  return std::make_unique<Engine>(threads, grid.options.stack_bytes);
}

}  // namespace kda::emulator
