// Asynchronous tensor core products of a warpgroup (four warps), sm_90a only. PTX ISA, "Asynchronous Warpgroup Level
// Matrix Multiply-Accumulate". A from registers, B from shared memory with the 128-byte swizzle.
#pragma once
#include "platform/memory.h"
#include "platform/mma.h"

namespace kda {

/// Descriptor of an operand in shared memory with the 128-byte swizzle; the start of the swizzled panel must be a
/// multiple of 1024 bytes. `group_stride`: bytes between groups of eight rows; `panel_stride`: bytes between panels of
/// 64 columns (MN-major operands only).
KDA_DEVICE uint64_t wgmma_descriptor(void const* start, uint32_t panel_stride, uint32_t group_stride) {
  uint32_t const address = shared_address(start);
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(panel_stride >> 4) << 16 | uint64_t(group_stride >> 4) << 32 |
         uint64_t(1) << 62;
}

#if defined(KDA_EMULATE)
namespace emulator {
template <class E>
float element_value(uint16_t bits) {
  return unpack2<E>(bits).x;
}
template <class E, int kN, bool kMnMajor>
void start_wgmma(MmaAccumulator (&d)[kN / 8], uint32_t const (&a)[4], uint64_t descriptor, bool accumulate,
                 Location where) {
  Wgmma x{kN, kMnMajor, accumulate, descriptor, a, &d[0].x[0], element_value<E>};
  Engine::current().start_wgmma(x, where);
}
}  // namespace emulator
#endif

/// Registers written before this are seen by the products after it. PTX: wgmma.fence.sync.aligned
KDA_DEVICE void wgmma_fence() {
#if !defined(KDA_EMULATE)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/// PTX: wgmma.commit_group.sync.aligned
KDA_DEVICE void wgmma_commit() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().commit_wgmma();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/// Until at most kPending groups are on their way. PTX: wgmma.wait_group.sync.aligned
template <int kPending>
KDA_DEVICE void wgmma_wait() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_wgmma(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
/// Shared memory written by ordinary stores is seen by wgmma and bulk copies after the next barrier; by each writing
/// thread. PTX: fence.proxy.async.shared::cta
KDA_DEVICE void fence_proxy_async() {
#if !defined(KDA_EMULATE)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
/// Changes the registers of the calling warpgroup's threads. PTX: setmaxnreg.{inc,dec}.sync.aligned.u32
template <int kRegisters, bool kMore>
KDA_DEVICE void set_max_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if !defined(KDA_EMULATE)
  if constexpr (kMore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#if !defined(KDA_EMULATE)
#define KDA_ACC1(i) "+f"(d[i].x[0]), "+f"(d[i].x[1]), "+f"(d[i].x[2]), "+f"(d[i].x[3])
#define KDA_ACC4(i) KDA_ACC1(i), KDA_ACC1(i + 1), KDA_ACC1(i + 2), KDA_ACC1(i + 3)
#define KDA_ACC8(i) KDA_ACC4(i), KDA_ACC4(i + 4)
#define KDA_REG32                                                                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define KDA_REG64                                                                                                 \
  KDA_REG32                                                                                                       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define KDA_WGMMA(N, TYPE, REGISTERS, A0, A1, A2, A3, DESC, SCALE, TRANS, ...)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SCALE                                                             \
               ", 0;\n"                                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A0 "," A1 "," A2 \
               "," A3 "}, " DESC ", p, 1, 1, " TRANS ";\n}"                                                          \
               : __VA_ARGS__                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int(accumulate)),                  \
                 "n"(int(kMnMajor)))
#define KDA_WGMMA64(TYPE) KDA_WGMMA("64", TYPE, KDA_REG32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", KDA_ACC8(0))
#define KDA_WGMMA128(TYPE) \
  KDA_WGMMA("128", TYPE, KDA_REG64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", KDA_ACC8(0), KDA_ACC8(8))
#endif

/// Starts D[64 x N] (+)= A[64 x 16] B[16 x N], E = Bf16 or Fp16, N = 64 or 128. B in shared memory: [N, 16] (K-major)
/// or [16, N] (MN-major). D may be touched only after the wait that covers the product.
/// PTX: wgmma.mma_async.sync.aligned.m64nNk16.f32
template <class E, int kN, bool kMnMajor>
KDA_DEVICE void wgmma_m64k16(MmaAccumulator (&d)[kN / 8], uint32_t const (&a)[4], uint64_t descriptor,
                             bool accumulate KDA_WHERE) {
  static_assert(kN == 64 || kN == 128);
#if defined(KDA_EMULATE)
  emulator::start_wgmma<E, kN, kMnMajor>(d, a, descriptor, accumulate, where);
#else
  if constexpr (kN == 64 && std::is_same_v<E, Bf16>) KDA_WGMMA64("bf16");
  else if constexpr (kN == 64) KDA_WGMMA64("f16");
  else if constexpr (std::is_same_v<E, Bf16>) KDA_WGMMA128("bf16");
  else KDA_WGMMA128("f16");
#endif
}

}  // namespace kda
