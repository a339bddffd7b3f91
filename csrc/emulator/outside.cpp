// How a block waits for other blocks, of its kernel and of those before it.
#include <algorithm>

#include "emulator/stream.h"

namespace kda::emulator {

/// Relaxed: nobody learns anything from the schedule.
static KDA_NO_TSAN uint32_t count_of(uint32_t const* flag) { return __atomic_load_n(flag, __ATOMIC_RELAXED); }

KDA_NO_TSAN bool Engine::has_come(Fiber const& fiber) const {
  return fiber.flag ? count_of(fiber.flag) >= fiber.flag_count : grid_->previous->has_ended();
}

bool Engine::can_go_on() const {
  EngineOnly scope;
  return !paused_ && std::any_of(outside_.begin(), outside_.end(), [&](Fiber* f) { return has_come(*f); });
}

bool Engine::waits_for_flag() const {
  EngineOnly scope;
  return std::any_of(outside_.begin(), outside_.end(), [](Fiber* f) { return f->flag; });
}

std::string Engine::deadlock() const {
  EngineOnly scope;
  std::string text = "deadlock: no block can go on";
  for (Fiber const* f : outside_) {
    if (!f->flag) continue;
    text = "deadlock: nobody raises the flag that stands at " + std::to_string(count_of(f->flag)) + " of " +
           std::to_string(f->flag_count);
    break;
  }
  return text + who_waits_where() + place();
}

/// The other threads of the block go on.
KDA_NO_TSAN void Engine::wait_outside(uint32_t const* flag, uint32_t count, char const* operation, Location location) {
  running->flag = flag, running->flag_count = count;
  outside_.push_back(running);
  block_on(operation, int(count), location);
}

/// The whole block stands still, which is where the kernel behind it shows what it does not wait for.
KDA_NO_TSAN void Engine::pause() {
  if (!grid_->may_pause || (options_.seed && random() % 2)) return;
  paused_ = true;
  make_ready(running->warp, 1u << running->lane);
  jump(nullptr);
}

void Engine::let_next_kernel_start() {
  EngineOnly scope;
  if (lets_next_start_) return;  // a block says it as soon as one of its threads does
  lets_next_start_ = true;
  pause();
}

/// The kernel before may have to wait for its own predecessor; whoever is behind this one knows of both.
void Engine::wait_for_previous_kernel(Location location) {
  Grid* const previous = grid_->previous;
  {
    EngineOnly scope;
    grid_->has_waited.store(true, std::memory_order_relaxed);
    if (!previous) return;
    if (!previous->has_ended()) wait_outside(nullptr, 0, "wait_for_previous_kernel", location);
  }
  acquire(&previous->done);
}

void Engine::raise_flag(uint32_t* flag, uint32_t count) {
  __atomic_fetch_add(flag, count, __ATOMIC_RELEASE);
  EngineOnly scope;
  pause();
}

void Engine::set_flag(uint32_t* flag, uint32_t value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  EngineOnly scope;
  pause();
}

void Engine::wait_flag(uint32_t const* flag, uint32_t count, Location location) {
  {
    EngineOnly scope;
    if (count_of(flag) < count) wait_outside(flag, count, "wait_flag", location);
  }
  (void)__atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

}  // namespace kda::emulator
