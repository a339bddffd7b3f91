// Counters in global memory by which blocks wait for blocks, also of kernels that were launched before theirs and run
// beside it (launch.h, launch_early). Never for kernels launched after: those may not start before this one ends.
#pragma once
#include "platform/macros.h"
#include "platform/math.h"

namespace kda {

/// `count` more, after everything that this thread, and others at a barrier before, have read and written.
/// PTX: red.release.gpu.global.add.u32
KDA_DEVICE void raise_flag(uint32_t* flag, uint32_t count) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().raise_flag(flag, count);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
#endif
}

/// As raise_flag, but after reads alone, whose data this thread knows to have arrived: nothing is waited for.
/// PTX: red.relaxed.gpu.global.add.u32
KDA_DEVICE void raise_flag_after_reads(uint32_t* flag, uint32_t count) {
#if defined(KDA_EMULATE)
  raise_flag(flag, count);
#else
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
#endif
}

/// One writer at a time. PTX: st.release.gpu.global.u32
KDA_DEVICE void set_flag(uint32_t* flag, uint32_t value) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().set_flag(flag, value);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

/// Whether the flag is at `count` or beyond; if so, this thread then sees what was written before it was raised. Not to
/// be called until it says so: that is wait_flag. PTX: ld.acquire.gpu.global.u32
KDA_DEVICE bool flag_reached(uint32_t const* flag, uint32_t count) {
#if defined(KDA_EMULATE)
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= count;
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value >= count;
#endif
}

/// A number that is its own flag, where zero was before: nothing else is ordered by it. A zero arrives as -0.
/// PTX: st.relaxed.gpu.global.f32
KDA_DEVICE void publish(float* at, float x) {
  if (x == 0.f) x = -0.f;
#if defined(KDA_EMULATE)
  emulator::Engine::current().set_flag(reinterpret_cast<uint32_t*>(at), float_to_bits(x));
#else
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(at), "f"(x) : "memory");
#endif
}
/// Waits for what another block publishes. PTX: ld.relaxed.gpu.global.u32
KDA_DEVICE float await_published(float const* at KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_flag(reinterpret_cast<uint32_t const*>(at), 1, where);
  return *at;
#else
  uint32_t bits;
  do {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(at) : "memory");
  } while (bits == 0);
  return bits_to_float(bits);
#endif
}

/// Until flag_reached.
KDA_DEVICE void wait_flag(uint32_t const* flag, uint32_t count KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_flag(flag, count, where);
#else
  while (!flag_reached(flag, count)) {
  }
#endif
}

}  // namespace kda
