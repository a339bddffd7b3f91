// Barriers in shared memory that count arrivals of threads and bytes of bulk copies. PTX ISA, "Parallel
// Synchronization: mbarrier".
//
// A phase completes when `count` threads have arrived and every expected byte has; its parity is 0, 1, 0, ... A wait
// for parity 1 of a barrier just initialised returns at once: the producer's first turn.
#pragma once
#include "platform/memory.h"

namespace kda {

/// Opaque; lives in shared memory.
struct alignas(8) Mbarrier {
  uint64_t word;
};

/// One thread; the others may use the barrier after fence_mbarrier_init and a barrier of the block.
/// PTX: mbarrier.init.shared::cta.b64
KDA_DEVICE void mbarrier_init(Mbarrier& barrier, uint32_t count KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().init_mbarrier(barrier.word, count, where);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
#endif
}
/// Makes the calling thread's inits visible to bulk copies. PTX: fence.mbarrier_init.release.cluster
KDA_DEVICE void fence_mbarrier_init() {
#if !defined(KDA_EMULATE)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
/// PTX: mbarrier.arrive.shared::cta.b64
KDA_DEVICE void mbarrier_arrive(Mbarrier& barrier KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().arrive_mbarrier(barrier.word, 0, where);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#endif
}
/// As mbarrier_arrive, and the phase has `bytes` more to wait for. PTX: mbarrier.arrive.expect_tx.shared::cta.b64
KDA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier& barrier, uint32_t bytes KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().arrive_mbarrier(barrier.word, bytes, where);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
#endif
}
/// Until the phase of this parity is complete. PTX: mbarrier.try_wait.parity.shared::cta.b64
KDA_DEVICE void mbarrier_wait(Mbarrier& barrier, uint32_t parity KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_mbarrier(barrier.word, parity, where);
#else
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

}  // namespace kda
