// mbarriers and the copies that they and the bulk groups cover. A load lands when nothing else can run (seeded
// schedules: sometimes earlier); a store reads shared memory and writes at the waits that ask for it.
#include "emulator/engine.h"

namespace kda::emulator {

namespace {
constexpr uint64_t kMbarrierWord = 0x6B64615F6D626172ull;  // what an initialised barrier holds
constexpr int64_t kMaxBytes = (1 << 20) - 1;               // of the transaction count

/// Library calls, which the sanitizers check: the copy's own memory is what it must be by the time it is issued.
void poison(std::vector<Copy> const& pieces) {
  for (Copy const& c : pieces) std::memset(c.to, 0xFF, c.bytes);
}
void touch_sources([[maybe_unused]] std::vector<Copy> const& pieces) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  std::vector<char> scratch;
  for (Copy const& c : pieces) {
    scratch.resize(c.valid);
    if (c.valid) std::memcpy(scratch.data(), c.from, c.valid);
  }
#endif
}
}  // namespace

// ---- mbarriers -------------------------------------------------------------------------------------------------

void Engine::init_mbarrier(uint64_t& word, uint32_t count, Location location) {
  uint32_t const at = shared_offset(&word);
  if (at % 8) fail("mbarrier.init: the address is not a multiple of 8 bytes", location);
  if (!count || count > kMaxBytes) fail("mbarrier.init: count " + std::to_string(count), location);
  word = kMbarrierWord;
  EngineOnly scope;
  auto const [it, fresh] = mbarriers_.try_emplace(at);
  if (!fresh)
    fail("mbarrier.init of a barrier that was initialised at " + it->second.initialised.text() + ", again", location);
  it->second.count = it->second.pending = count;
  it->second.initialised = location;
}

/// Reads the word, so that ThreadSanitizer sees the use of a barrier that was not yet initialised for this thread.
KDA_NO_TSAN MbarrierState& Engine::mbarrier(uint64_t const& word, char const* operation, Location location) {
  auto const it = mbarriers_.find(shared_offset(&word));
  if (it == mbarriers_.end()) fail(std::string(operation) + ": the mbarrier was never initialised", location);
  if (word != kMbarrierWord)
    fail(std::string(operation) + ": the mbarrier initialised at " + it->second.initialised.text() +
             " was overwritten; found",
         location);
  return it->second;
}

static void see_word(uint64_t const& word) { *const_cast<uint64_t volatile*>(&word); }

KDA_NO_TSAN void Engine::complete_phase(MbarrierState& b) {
  if (b.pending || b.bytes) return;
  if (b.unobserved) fail("nobody waited for the bulk copy issued", b.unobserved_load);
  b.unobserved = b.loads, b.unobserved_load = b.last_load;
  for (int w = 0; w < warps_; ++w) {
    if (b.waiting[w]) b.unobserved = false;
    make_ready(w, b.waiting[w]);
    b.waiting[w] = 0;
  }
  b.loads = false;
  b.phase ^= 1;
  b.pending = b.count;
}

void Engine::arrive_mbarrier(uint64_t const& word, uint32_t expected_bytes, Location location) {
  see_word(word);
  EngineOnly scope;
  MbarrierState& b = mbarrier(word, "mbarrier.arrive", location);
  if (!b.pending)
    fail("mbarrier.arrive: more than " + std::to_string(b.count) + " arrivals in one phase of the mbarrier of " +
             b.initialised.text() + ", the last",
         location);
  release(&b.sync[b.phase]);
  b.bytes += expected_bytes;
  if (b.bytes > kMaxBytes) fail("mbarrier.arrive.expect_tx: more than 2^20 - 1 bytes expected", location);
  --b.pending;
  complete_phase(b);
}

void Engine::wait_mbarrier(uint64_t const& word, uint32_t parity, Location location) {
  see_word(word);
  void* sync;
  {
    EngineOnly scope;
    MbarrierState& b = mbarrier(word, "mbarrier.try_wait", location);
    if (parity > 1) fail("mbarrier.try_wait: parity " + std::to_string(parity) + " is neither 0 nor 1", location);
    while (b.phase == parity) {
      b.waiting[running->warp] |= 1u << running->lane;
      block_on("mbarrier.try_wait", int(parity), location);
    }
    b.unobserved = false;
    sync = &b.sync[parity];
  }
  acquire(sync);
}

// ---- global to shared ------------------------------------------------------------------------------------------

/// What the issuer wrote before is ordered before the end of the phase.
void Engine::start_bulk_load(BulkLoad load, uint64_t const& word) {
  see_word(word);
  touch_sources(load.pieces);
  poison(load.pieces);
  EngineOnly scope;
  MbarrierState& b = mbarrier(word, "cp.async.bulk", load.location);
  load.barrier = shared_offset(&word);
  release(&b.sync[b.phase]);
  loads_.push_back(std::move(load));
}

KDA_NO_TSAN void Engine::finish_load(size_t i) {
  BulkLoad const load = std::move(loads_[i]);
  loads_.erase(loads_.begin() + ptrdiff_t(i));
  for (Copy const& c : load.pieces) {
    if (c.valid) std::memcpy(c.to, c.from, c.valid);
    std::memset(c.to + c.valid, 0, c.bytes - c.valid);
  }
  MbarrierState& b = mbarriers_.at(load.barrier);
  b.last_load = load.location;
  b.loads = true;
  b.bytes -= load.bytes;
  if (b.bytes < -kMaxBytes) fail("cp.async.bulk: 2^20 bytes more arrived than the mbarrier expected", load.location);
  complete_phase(b);
}

// ---- shared to global ------------------------------------------------------------------------------------------

void Engine::start_bulk_store(BulkStore store) {
  poison(store.pieces);
  EngineOnly scope;
  running->bulk_stores.open.push_back(std::move(store));
}

void Engine::commit_bulk_stores() {
  EngineOnly scope;
  BulkStoreQueue& q = running->bulk_stores;
  q.groups.push_back(std::move(q.open));
  q.open.clear();
}

/// Instrumented: the reads of shared memory happen here, and race with whoever refills it.
static void read_shared(BulkStore& store) {
  char* to;
  {
    EngineOnly scope;
    if (store.read) return;
    store.read = true;
    size_t bytes = 0;
    for (Copy const& c : store.pieces) bytes += c.bytes;
    store.staged.resize(bytes);
    to = store.staged.data();
  }
  for (Copy const& c : store.pieces) {
    std::memcpy(to, c.from, c.bytes);
    to += c.bytes;
  }
}
static void write_global(BulkStore const& store) {
  char const* from = store.staged.data();
  for (Copy const& c : store.pieces) {
    std::memcpy(c.to, from, c.bytes);
    from += c.bytes;
  }
}

void Engine::wait_bulk_stores(size_t keep, bool written) {
  auto& groups = running->bulk_stores.groups;
  size_t const due = groups.size() > keep ? groups.size() - keep : 0;
  for (size_t i = 0; i < due; ++i)
    for (BulkStore& store : groups[i]) {
      read_shared(store);
      if (written) write_global(store);
    }
  EngineOnly scope;
  if (written) groups.erase(groups.begin(), groups.begin() + ptrdiff_t(due));
}

// ---- what must not be left behind ------------------------------------------------------------------------------

/// Stores whose shared memory has been read may be completed by the end of the grid.
KDA_NO_TSAN void Engine::check_finished_thread() {
  Fiber& f = *running;
  if (Copy const* first = f.copies.first())
    fail("a thread exits with cp.async copies that were never waited for, issued", first->location);
  if (!f.bulk_stores.open.empty())
    fail("a thread exits with a bulk store that was never committed, issued", f.bulk_stores.open.front().location);
  for (auto& group : f.bulk_stores.groups)
    for (BulkStore& store : group) {
      if (!store.read)
        fail("a thread exits while a bulk store may still read its shared memory, issued", store.location);
      write_global(store);
    }
  auto const& products = warpgroups_[f.warp / 4].accumulators[f.warp % 4 * 32 + f.lane];
  if (!products.empty())
    fail("a thread exits with wgmma results that were never waited for, started", products.begin()->second.location);
}

KDA_NO_TSAN void Engine::check_finished_block() {
  if (!loads_.empty()) fail("the block ends with a bulk copy on its way, issued", loads_.front().location);
  for (auto const& [at, b] : mbarriers_) {
    if (b.unobserved) fail("nobody waited for the bulk copy issued", b.unobserved_load);
    if (b.bytes)
      fail("the block ends with an mbarrier whose expected bytes and arrived bytes differ by " +
               std::to_string(b.bytes) + ", initialised",
           b.initialised);
  }
}

}  // namespace kda::emulator
