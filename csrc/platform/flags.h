// Counters in global memory by which blocks wait for others, of their own kernel and of kernels launched before.
#pragma once
#include "platform/macros.h"

namespace kda {

/// One more at a global counter, after everything this block wrote before its last barrier.
/// PTX: red.release.gpu.global.add.u32
KDA_DEVICE void raise_flag(uint32_t* flag) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().raise_flag(flag);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(flag)) : "memory");
#endif
}

/// Until the counter has reached `count`; what was written before is then visible.
/// PTX: ld.acquire.gpu.global.u32 in a loop
KDA_DEVICE void wait_flag(uint32_t const* flag, uint32_t count KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_flag(flag, count, where);
#else
  uint32_t raised;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(__cvta_generic_to_global(flag)) : "memory");
  } while (raised < count);
#endif
}

}  // namespace kda
