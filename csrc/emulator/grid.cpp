// Blocks over OS threads, and what the tests may set and ask.
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "emulator/engine.h"

namespace kda::emulator {

namespace {
std::mutex record_mutex;
std::string record;  // names of the kernels that ran, one a line
}  // namespace

static void remember(char const* kernel) {
  std::lock_guard<std::mutex> lock(record_mutex);
  record += kernel;
  record += '\n';
}

void run_grid(char const* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> const& body) {
  Options const opt = options();
  if (opt.skip_launches) return;
  uint64_t const blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  auto work = [&] {
    Engine* outer = Engine::current_slot();
    try {
      Engine engine(grid, block, dynamic_bytes, opt);
      for (uint64_t i; (i = next++) < blocks;) {
        uint64_t const k = opt.seed & 1 ? blocks - 1 - i : i;  // odd seeds visit the blocks backwards
        engine.run_block(uint3{unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / grid.x / grid.y)},
                         body);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      next = blocks;
    }
    Engine::current_slot() = outer;
  };
  remember(kernel);
  if (opt.os_threads <= 1 || blocks <= 1) {
    work();
  } else {
    std::vector<std::thread> threads;
    for (int i = 0; i < opt.os_threads; ++i) threads.emplace_back(work);
    for (std::thread& t : threads) t.join();
  }
  if (!failure) return;
  try {
    std::rethrow_exception(failure);
  } catch (Error const& e) {
    throw Error(std::string(kernel) + ": " + e.what());
  }
}

}  // namespace kda::emulator

// For kda_cuda.testing, through ctypes.
extern "C" {
__attribute__((visibility("default"))) void kda_emulator_configure(uint64_t seed, int os_threads, int shared_kilobytes,
                                                                   int has_wgmma, int multiprocessors) {
  kda::emulator::Options& o = kda::emulator::options();
  o.seed = seed, o.os_threads = os_threads, o.shared_limit = size_t(shared_kilobytes) * 1024, o.has_wgmma = has_wgmma;
  o.multiprocessors = multiprocessors;
}
__attribute__((visibility("default"))) void kda_emulator_skip_launches(int skip) {
  kda::emulator::options().skip_launches = skip;
}
/// Copies the names of the kernels that ran since the last call, one a line; returns the length.
__attribute__((visibility("default"))) int kda_emulator_take_record(char* to, int capacity) {
  using namespace kda::emulator;
  std::lock_guard<std::mutex> lock(record_mutex);
  int const n = int(record.size()) < capacity - 1 ? int(record.size()) : capacity - 1;
  std::memcpy(to, record.data(), size_t(n));
  to[n] = 0;
  record.clear();
  return n;
}
}
