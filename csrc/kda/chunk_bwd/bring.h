// Whole structs of a cell into shared memory: by bulk copies of one thread, or by cp.async of all.
#pragma once
#include "platform/platform.h"

namespace kda {

/// Copies of one turn. `kBulk`: one thread starts them, and a barrier in shared memory counts their bytes; else they
/// belong to the group of cp.async that each thread commits next.
template <bool kBulk, int kThreads>
struct Bringer {
  Mbarrier& full;
  int const thread;

  /// By all threads, before a barrier, after which copies may be started.
  KDA_DEVICE void init() const {
    if constexpr (kBulk) {
      if (thread) return;
      mbarrier_init(full, 1);
      fence_mbarrier_init();
    }
  }
  /// bring(to, from, to, from, ...)
  template <class... T>
  KDA_DEVICE void bring(T&... x) const {
    if constexpr (kBulk) {
      if (thread) return;
      mbarrier_arrive_expect_tx(full, uint32_t((sizeof(T) + ...)) / 2);
    }
    start(x...);
  }
  /// Until what was brought is there; of cp.async the caller waits for its group.
  KDA_DEVICE void wait(uint32_t parity) const {
    if constexpr (kBulk) mbarrier_wait(full, parity);
  }

  /// By every thread that wrote to the place of a copy, before a barrier, after which the copy may be started.
  KDA_DEVICE void release() const {
    if constexpr (kBulk) fence_proxy_async();
  }

 private:
  KDA_DEVICE void start() const {}
  template <class T, class... More>
  KDA_DEVICE void start(T& to, T& from, More&... more) const {
    static_assert(sizeof(T) % 16 == 0);
    if constexpr (kBulk) {
      bulk_load(&to, &from, sizeof(T), full);
    } else {
      for (int i = thread * 16; i < int(sizeof(T)); i += kThreads * 16)
        cp_async_16(reinterpret_cast<char*>(&to) + i, reinterpret_cast<char const*>(&from) + i);
    }
    start(more...);
  }
};

}  // namespace kda
