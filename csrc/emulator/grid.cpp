// What the tests may set and ask.
#include <mutex>

#include "emulator/stream.h"

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

void run_grid(char const* kernel, bool early, dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body) {
  Options const& o = options();
  if (o.skip_launches) return;
  remember(kernel);
  auto g = std::make_unique<Grid>();
  g->kernel = kernel, g->early = early, g->body = std::move(body), g->options = o;
  g->size = grid, g->block = block, g->blocks = uint64_t(grid.x) * grid.y * grid.z, g->dynamic_bytes = dynamic_bytes;
  Stream::current().launch(std::move(g));
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
