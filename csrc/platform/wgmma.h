// Asynchronous tensor core products of a warpgroup (four warps), sm_90a only. PTX ISA, "Asynchronous Warpgroup Level
// Matrix Multiply-Accumulate". A from registers or shared memory, B from shared memory; with the 128-byte swizzle.
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
/// Changes the registers of the calling warpgroup's threads: all its warps together, all warpgroups within the
/// kernel's own registers times its threads. PTX: setmaxnreg.{inc,dec}.sync.aligned.u32
template <int kRegisters, bool kMore>
KDA_DEVICE void set_max_registers(KDA_WHERE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(KDA_EMULATE)
  emulator::Engine::current().set_registers(kRegisters, kMore, where);
#else
  if constexpr (kMore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#if !defined(KDA_EMULATE)
#define KDA_ACC1(i) "+f"(d[i].x[0]), "+f"(d[i].x[1]), "+f"(d[i].x[2]), "+f"(d[i].x[3])
#define KDA_ACC4(i) KDA_ACC1(i), KDA_ACC1(i + 1), KDA_ACC1(i + 2), KDA_ACC1(i + 3)
#define KDA_ACC8(i) KDA_ACC4(i), KDA_ACC4(i + 4)
#define KDA_ACC16(i) KDA_ACC8(i), KDA_ACC8(i + 8)
#define KDA_REG16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define KDA_REG32 KDA_REG16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KDA_REG64                                                                                                 \
  KDA_REG32                                                                                                       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define KDA_REG128                                                                                                \
  KDA_REG64                                                                                                       \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
  "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"    \
  "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// The operands behind the accumulators: A (four registers, or a descriptor), B's descriptor, whether to accumulate, and
// which operands in shared memory are MN-major.
#define KDA_WGMMA(N, TYPE, REGISTERS, A, B, ACCUMULATE, MAJORS, ...)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                               \
               ", 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
               ", p, 1, 1, " MAJORS ";\n}"                                                                  \
               : __VA_ARGS__)
#define KDA_WGMMA_RS(N, TYPE, REGISTERS, A, B, ACCUMULATE, MAJORS, ...)                                             \
  KDA_WGMMA(N, TYPE, REGISTERS, A, B, ACCUMULATE, MAJORS, __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), \
            "l"(b), "r"(int(accumulate)), "n"(int(kBMnMajor)))
#define KDA_WGMMA_SS(N, TYPE, REGISTERS, A, B, ACCUMULATE, MAJORS, ...)                                       \
  KDA_WGMMA(N, TYPE, REGISTERS, A, B, ACCUMULATE, MAJORS, __VA_ARGS__ : "l"(a), "l"(b), "r"(int(accumulate)), \
            "n"(int(kAMnMajor)), "n"(int(kBMnMajor)))
// Every N of one type, then the types.
#define KDA_WGMMA_RS_ALL(TYPE)                                                                                        \
  if constexpr (kN == 32) KDA_WGMMA_RS("32", TYPE, KDA_REG16, "{%16,%17,%18,%19}", "%20", "%21", "%22", KDA_ACC4(0)); \
  else if constexpr (kN == 64)                                                                                        \
    KDA_WGMMA_RS("64", TYPE, KDA_REG32, "{%32,%33,%34,%35}", "%36", "%37", "%38", KDA_ACC8(0));                       \
  else if constexpr (kN == 128)                                                                                       \
    KDA_WGMMA_RS("128", TYPE, KDA_REG64, "{%64,%65,%66,%67}", "%68", "%69", "%70", KDA_ACC16(0));                     \
  else                                                                                                                \
    KDA_WGMMA_RS("256", TYPE, KDA_REG128, "{%128,%129,%130,%131}", "%132", "%133", "%134", KDA_ACC16(0), KDA_ACC16(16))
#define KDA_WGMMA_SS_ALL(TYPE)                                                                                       \
  if constexpr (kN == 32) KDA_WGMMA_SS("32", TYPE, KDA_REG16, "%16", "%17", "%18", "%19, %20", KDA_ACC4(0));         \
  else if constexpr (kN == 64) KDA_WGMMA_SS("64", TYPE, KDA_REG32, "%32", "%33", "%34", "%35, %36", KDA_ACC8(0));    \
  else if constexpr (kN == 128) KDA_WGMMA_SS("128", TYPE, KDA_REG64, "%64", "%65", "%66", "%67, %68", KDA_ACC16(0)); \
  else KDA_WGMMA_SS("256", TYPE, KDA_REG128, "%128", "%129", "%130", "%131, %132", KDA_ACC16(0), KDA_ACC16(16))
#endif

template <int kN>
inline constexpr bool kIsWgmmaWidth = kN == 32 || kN == 64 || kN == 128 || kN == 256;

/// Starts D[64 x N] (+)= A[64 x 16] B[16 x N], E = Bf16 or Fp16, N = 32, 64, 128 or 256. A in registers, as mma.sync
/// has it: each warp its 16 rows. B in shared memory: [N, 16] (K-major) or [16, N] (MN-major). D may be touched only
/// after the wait that covers the product. PTX: wgmma.mma_async.sync.aligned.m64nNk16.f32
template <class E, int kN, bool kBMnMajor>
KDA_DEVICE void wgmma_m64k16(MmaAccumulator (&d)[kN / 8], uint32_t const (&a)[4], uint64_t b,
                             bool accumulate KDA_WHERE) {
  static_assert(kIsWgmmaWidth<kN>);
#if defined(KDA_EMULATE)
  emulator::Engine::current().start_wgmma(
      {kN, false, kBMnMajor, accumulate, 0, b, a, &d[0].x[0], emulator::element_value<E>}, where);
#else
  if constexpr (std::is_same_v<E, Bf16>) {
    KDA_WGMMA_RS_ALL("bf16");
  } else {
    KDA_WGMMA_RS_ALL("f16");
  }
#endif
}

/// The same with A in shared memory: [64, 16] (K-major) or [16, 64] (MN-major).
template <class E, int kN, bool kAMnMajor, bool kBMnMajor>
KDA_DEVICE void wgmma_m64k16_shared(MmaAccumulator (&d)[kN / 8], uint64_t a, uint64_t b, bool accumulate KDA_WHERE) {
  static_assert(kIsWgmmaWidth<kN>);
#if defined(KDA_EMULATE)
  emulator::Engine::current().start_wgmma(
      {kN, kAMnMajor, kBMnMajor, accumulate, a, b, nullptr, &d[0].x[0], emulator::element_value<E>}, where);
#else
  if constexpr (std::is_same_v<E, Bf16>) {
    KDA_WGMMA_SS_ALL("bf16");
  } else {
    KDA_WGMMA_SS_ALL("f16");
  }
#endif
}

}  // namespace kda
