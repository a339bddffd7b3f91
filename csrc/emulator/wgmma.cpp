// Warpgroup products: started by all 128 threads together, executed at the first wait that covers them. Until then the
// accumulators are poisoned; B is read as late as the kernel allows, A when the product starts (it is in registers).
#include "emulator/engine.h"

namespace kda::emulator {

/// Byte address of element (n, k) of B. PTX ISA, canonical layouts with the 128-byte swizzle: K-major rows of n hold 64
/// values of k; MN-major rows of k hold 64 values of n.
static KDA_NO_TSAN uint32_t element_address(uint64_t descriptor, int n, int k, bool mn_major) {
  uint32_t const base = uint32_t(descriptor & 0x3FFF) << 4, panel = uint32_t(descriptor >> 16 & 0x3FFF) << 4,
                 group = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t const address = mn_major ? base + n % 64 * 2 + n / 64 * panel + k % 8 * 128 + k / 8 * group
                                    : base + n / 8 * group + n % 8 * 128 + k * 2;
  return address ^ (address >> 7 & 7) << 4;
}

void Engine::start_wgmma(Wgmma const& x, Location location) {
  int const warp = running->warp;
  Warpgroup& group = warpgroups_[warp / 4];
  if (warp / 4 * 4 + 4 > warps_) fail("wgmma by an incomplete warpgroup");
  group.arguments[warp % 4 * 32 + running->lane] = x;
  if (++group.arrived < 128) {
    group.waiting[warp % 4] |= 1u << running->lane;
    block_on("wgmma", warp / 4, location);
    return;
  }
  group.arrived = 0;
  issue_wgmma(group);
  for (int w = 0; w < 4; ++w) {
    make_ready(warp / 4 * 4 + w, group.waiting[w]);
    group.waiting[w] = 0;
  }
}

KDA_NO_TSAN void Engine::issue_wgmma(Warpgroup& g) {
  EngineOnly scope;
  bool all_done = true;
  for (PendingWgmma const& earlier : g.pending) all_done = all_done && earlier.done;
  if (all_done) g.pending.clear();
  PendingWgmma op;
  op.shape = g.arguments[0], op.group = g.commits[0], op.done = false;
  for (int i = 0; i < 128; ++i) {
    Wgmma const& x = g.arguments[i];
    if (x.descriptor != op.shape.descriptor || x.accumulate != op.shape.accumulate || x.n != op.shape.n)
      fail("wgmma: the threads of a warpgroup disagree on the product");
    if (g.commits[i] != op.group) fail("wgmma: the threads of a warpgroup disagree on the group");
    std::memcpy(op.a[i], x.a, 16);
    int const count = x.n / 2;
    auto it = g.accumulators[i].find(x.d);
    if (it == g.accumulators[i].end()) {
      it = g.accumulators[i].emplace(x.d, InFlight{std::vector<float>(x.d, x.d + count), op.group}).first;
    } else {
      for (int j = 0; j < count; ++j)
        if (x.d[j] == x.d[j]) fail("wgmma: an accumulator was written while in flight");
    }
    it->second.group = op.group;
    op.d[i] = it->second.value.data();
    std::memset(x.d, 0xFF, size_t(count) * 4);
  }
  g.pending.push_back(op);
}

void Engine::commit_wgmma() {
  EngineOnly scope;
  ++warpgroups_[running->warp / 4].commits[running->warp % 4 * 32 + running->lane];
}

KDA_NO_TSAN PendingWgmma* Engine::due_wgmma(Warpgroup& g, size_t i, int before) {
  EngineOnly scope;
  if (i >= g.pending.size()) return nullptr;
  PendingWgmma& op = g.pending[i];
  if (op.done || op.group >= before) return nullptr;
  op.done = true;
  return &op;
}

/// Instrumented where it reads B: the sanitizers see the access.
__attribute__((optimize("O3"))) void Engine::run_wgmma(PendingWgmma& op) {
  Wgmma const shape = op.shape;
  float b[16][128];
  for (int n = 0; n < shape.n; ++n)
    for (int k = 0; k < 16; ++k) {
      uint32_t const address = element_address(shape.descriptor, n, k, shape.mn_major);
      if (address >= kSharedWindow) fail("wgmma: the descriptor leaves shared memory");
      uint16_t bits;
      std::memcpy(&bits, window_ + address, 2);
      b[k][n] = shape.value(bits);
    }
  EngineOnly scope;
  for (int warp = 0; warp < 4; ++warp) {
    float a[16][16];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < 2; ++h)
          a[l / 4 + i % 2 * 8][l % 4 * 2 + h + i / 2 * 8] = shape.value(uint16_t(op.a[warp * 32 + l][i] >> 16 * h));
    for (int r = 0; r < 16; ++r) {
      float sum[128] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < shape.n; ++n) sum[n] += a[r][k] * b[k][n];
      for (int n = 0; n < shape.n; ++n) {
        float& d = op.d[warp * 32 + r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + n % 2];
        d = (shape.accumulate ? d : 0.f) + sum[n];
      }
    }
  }
}

void Engine::wait_wgmma(int keep) {
  Warpgroup& g = warpgroups_[running->warp / 4];
  int const thread = running->warp % 4 * 32 + running->lane;
  int before;
  size_t count;
  {
    EngineOnly scope;
    before = g.commits[thread] - keep;
    count = g.pending.size();
  }
  for (size_t i = 0; i < count; ++i)
    if (PendingWgmma* op = due_wgmma(g, i, before)) run_wgmma(*op);
  EngineOnly scope;
  auto& mine = g.accumulators[thread];
  for (auto it = mine.begin(); it != mine.end();)
    if (it->second.group < before) {
      std::memcpy(it->first, it->second.value.data(), it->second.value.size() * 4);
      it = mine.erase(it);
    } else {
      ++it;
    }
}

}  // namespace kda::emulator
