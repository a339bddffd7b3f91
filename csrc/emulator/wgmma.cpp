// Warpgroup products: started by all 128 threads together, executed at the first wait that covers them. Until then the
// accumulators are poisoned; B is read as late as the kernel allows, A when the product starts (it is in registers).
#include <algorithm>

#include "emulator/engine.h"
#include "emulator/tensor_core.h"

namespace kda::emulator {

KDA_NO_TSAN uint32_t wgmma_element_address(uint64_t descriptor, int n, int k, bool mn_major) {
  uint32_t const base = uint32_t(descriptor & 0x3FFF) << 4, panel = uint32_t(descriptor >> 16 & 0x3FFF) << 4,
                 group = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t const address = mn_major ? base + n % 64 * 2 + n / 64 * panel + k % 8 * 128 + k / 8 * group
                                    : base + n / 8 * group + n % 8 * 128 + k * 2;
  return address ^ (address >> 7 & 7) << 4;
}

KDA_NO_TSAN void Engine::start_wgmma(Wgmma const& x, Location location) {
  int const warp = running->warp;
  Warpgroup& group = warpgroups_[warp / 4];
  if (warp / 4 * 4 + 4 > warps_) fail("wgmma by an incomplete warpgroup", location);
  for (uint64_t descriptor : {x.a ? x.b_descriptor : x.a_descriptor, x.b_descriptor})
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7)
      fail("wgmma: a descriptor that is not of the 128-byte swizzle with base offset 0", location);
  group.arguments[warp % 4 * 32 + running->lane] = x;
  if (++group.arrived < 128) {
    group.waiting[warp % 4] |= 1u << running->lane;
    block_on("wgmma", warp / 4, location);
    return;
  }
  group.arrived = 0;
  issue_wgmma(group, location);
  for (int w = 0; w < 4; ++w) {
    make_ready(warp / 4 * 4 + w, group.waiting[w]);
    group.waiting[w] = 0;
  }
}

KDA_NO_TSAN void Engine::issue_wgmma(Warpgroup& g, Location location) {
  EngineOnly scope;
  bool all_done = true;
  for (PendingWgmma const& earlier : g.pending) all_done = all_done && earlier.done;
  if (all_done) g.pending.clear();
  PendingWgmma op;
  op.shape = g.arguments[0], op.group = g.commits[0], op.done = false, op.location = location;
  for (int i = 0; i < 128; ++i) {
    Wgmma const& x = g.arguments[i];
    Wgmma const& first = op.shape;
    if (x.a_descriptor != first.a_descriptor || x.b_descriptor != first.b_descriptor || !x.a != !first.a ||
        x.accumulate != first.accumulate || x.n != first.n || x.a_mn_major != first.a_mn_major ||
        x.b_mn_major != first.b_mn_major)
      fail("wgmma: the threads of a warpgroup disagree on the product", location);
    if (g.commits[i] != op.group) fail("wgmma: the threads of a warpgroup disagree on the group", location);
    if (x.a) std::memcpy(op.a[i], x.a, 16);
    int const count = x.n / 2;
    auto it = g.accumulators[i].find(x.d);
    if (it == g.accumulators[i].end()) {
      it = g.accumulators[i].emplace(x.d, InFlight{std::vector<float>(x.d, x.d + count), op.group}).first;
    } else {
      for (int j = 0; j < count; ++j)
        if (x.d[j] == x.d[j]) fail("wgmma: an accumulator was written while in flight, before the product", location);
    }
    it->second.group = op.group, it->second.location = location;
    op.d[i] = it->second.value.data();
    std::memset(x.d, 0xFF, size_t(count) * 4);
  }
  g.pending.push_back(op);
}

KDA_NO_TSAN void Engine::commit_wgmma() {
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

/// Instrumented where it reads shared memory: the sanitizers see the access.
template <int kRowLimit>
static void load_operand(float (&to)[16][kRowLimit], char const* window, uint64_t descriptor, int rows, bool mn_major,
                         PendingWgmma const& op) {
  for (int n = 0; n < rows; ++n)
    for (int k = 0; k < 16; ++k) {
      uint32_t const address = wgmma_element_address(descriptor, n, k, mn_major);
      if (address >= kSharedWindow) Engine::current().fail("wgmma: a descriptor leaves shared memory", op.location);
      uint16_t bits;
      std::memcpy(&bits, window + address, 2);
      to[k][n] = op.shape.value(bits);
    }
}

/// A[64 x 16], transposed, from the registers of the warpgroup's threads.
static KDA_NO_TSAN void gather_left(float (&to)[16][64], PendingWgmma const& op) {
  for (int i = 0; i < 128; ++i)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) {
        int const row = i / 32 * 16 + i % 32 / 4 + r % 2 * 8, k = i % 4 * 2 + h + r / 2 * 8;
        to[k][row] = op.shape.value(uint16_t(op.a[i][r] >> 16 * h));
      }
}

__attribute__((optimize("O3"))) void Engine::run_wgmma(PendingWgmma& op) {
  Wgmma const shape = op.shape;
  float a[16][64], b[16][256];
  load_operand(b, window_, shape.b_descriptor, shape.n, shape.b_mn_major, op);
  if (!shape.a) load_operand(a, window_, shape.a_descriptor, 64, shape.a_mn_major, op);
  EngineOnly scope;
  if (shape.a) gather_left(a, op);
  float rows[64][16], columns[16][8], d[64][8];
  for (int r = 0; r < 64; ++r)
    for (int k = 0; k < 16; ++k) rows[r][k] = a[k][r];
  for (int n = 0; n < shape.n; n += 8) {
    auto const at = [&](int r, int c) -> float& {
      return op.d[r / 16 * 32 + r % 8 * 4 + c / 2][n / 2 + r % 16 / 8 * 2 + c % 2];
    };
    for (int k = 0; k < 16; ++k) std::memcpy(columns[k], &b[k][n], sizeof(columns[k]));
    for (int r = 0; r < 64; ++r)
      for (int c = 0; c < 8; ++c) d[r][c] = shape.accumulate ? at(r, c) : 0.f;
    add_products<16>(kHopperCore, 64, rows, columns, d);
    for (int r = 0; r < 64; ++r)
      for (int c = 0; c < 8; ++c) at(r, c) = d[r][c];
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

// ---- setmaxnreg ------------------------------------------------------------------------------------------------

/// All warps of the warpgroup together; `inc` waits until the block's pool has the registers. The compiler starts a
/// block with as many registers as fit, but no more than an `inc` asks for.
KDA_NO_TSAN void Engine::set_registers(int count, bool more, Location location) {
  EngineOnly scope;
  int const warp = running->warp;
  std::string const operation = std::string(more ? "setmaxnreg.inc " : "setmaxnreg.dec ") + std::to_string(count);
  if (warp / 4 * 4 + 4 > warps_) fail(operation + " by an incomplete warpgroup", location);
  Warpgroup& g = warpgroups_[warp / 4];
  if (count % 8 || count < 24 || count > 256) fail(operation + ": not a multiple of 8 in 24..256", location);
  if (g.registers_wanted && g.registers_wanted != (more ? count : -count))
    fail(operation + ": the warps of a warpgroup disagree", location);
  if (more && !g.registers) entry_registers_ = std::min(entry_registers_, count);
  int const now = g.registers ? g.registers : entry_registers_;
  if (more ? count < now : count > now)
    fail(operation + ": the threads have " + std::to_string(now) + " registers", location);
  g.registers_wanted = more ? count : -count;
  ++g.registers_arrived;
  g.registers_waiting[warp % 4] |= 1u << running->lane;
  grant_registers();
  block_on(more ? "setmaxnreg.inc" : "setmaxnreg.dec", count, location);
}

/// Completes every setmaxnreg at which its whole warpgroup waits and for which the pool has enough.
KDA_NO_TSAN void Engine::grant_registers() {
  int const groups = (warps_ + 3) / 4;
  for (bool again = true; again;) {
    again = false;
    int taken = 0;
    for (int i = 0; i < groups; ++i) taken += warpgroups_[i].registers ? warpgroups_[i].registers : entry_registers_;
    for (int i = 0; i < groups && !again; ++i) {
      Warpgroup& g = warpgroups_[i];
      int const wanted = std::abs(g.registers_wanted), now = g.registers ? g.registers : entry_registers_;
      if (g.registers_arrived < 128 || taken + wanted - now > entry_registers_ * groups) continue;
      g.registers = wanted;
      g.registers_arrived = 0, g.registers_wanted = 0;
      for (int w = 0; w < 4; ++w) {
        make_ready(i * 4 + w, g.registers_waiting[w]);
        g.registers_waiting[w] = 0;
      }
      again = true;
    }
  }
}

}  // namespace kda::emulator
