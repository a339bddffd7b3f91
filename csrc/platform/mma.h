// Tensor core products of one warp. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8".
#pragma once
#if defined(KDA_EMULATE)
#include "emulator/tensor_core.h"
#endif
#include "platform/types.h"
#include "platform/warp.h"

namespace kda {

/// A 16 x 8 fp32 fragment of one warp: lane l holds rows l/4 and l/4 + 8, columns 2(l%4) and 2(l%4) + 1.
struct MmaAccumulator {
  float x[4];
};

#if defined(KDA_EMULATE)
namespace emulator {
struct Mma {
  uint32_t const* a;
  uint32_t b[2];
  float* d;
};
/// D[16 x 8] += A[16 x kDepth] B[kDepth x 8]; kPerRegister elements in a register.
template <int kDepth, int kPerRegister, class Value>
KDA_NO_TSAN __attribute__((optimize("O3"))) void run_mma(Mma** lanes, Value value) {
  float a[16][kDepth], b[kDepth][8], d[16][8];
  constexpr int kHalf = kDepth / 2;  // depth covered by registers 0 and 1 of A, and by register 0 of B
  auto const at = [](auto& matrix, int l, int i) -> float& { return matrix[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]; };
  for (int l = 0; l < 32; ++l) {
    for (int h = 0; h < kPerRegister; ++h) {
      int const k = l % 4 * kPerRegister + h;
      for (int i = 0; i < 4; ++i) a[l / 4 + i % 2 * 8][k + i / 2 * kHalf] = value(lanes[l]->a[i], h);
      for (int i = 0; i < 2; ++i) b[k + i * kHalf][l / 4] = value(lanes[l]->b[i], h);
    }
    for (int i = 0; i < 4; ++i) at(d, l, i) = lanes[l]->d[i];
  }
  add_products<kDepth>(tensor_core(), 16, a, b, d);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) lanes[l]->d[i] = at(d, l, i);
}
template <class E>
KDA_NO_TSAN void exchange_mma_16(Mma** lanes, uint32_t) {
  run_mma<16, 2>(lanes, [](uint32_t bits, int h) {
    float2 const pair = unpack2<E>(bits);
    return h ? pair.y : pair.x;
  });
}
inline KDA_NO_TSAN void exchange_mma_tf32(Mma** lanes, uint32_t) {
  run_mma<8, 1>(lanes, [](uint32_t bits, int) { return bits_to_float(bits & 0xFFFFE000u); });
}
}  // namespace emulator
#endif

/// D[16 x 8] += A[16 x 16] B[16 x 8], E = Bf16 or Fp16. PTX: mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}
template <class E>
KDA_DEVICE void mma_m16n8k16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1 KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Mma x{a, {b0, b1}, d};
  emulator::Engine::current().warp_collective<emulator::Mma>("mma.m16n8k16", ~0u, &x, emulator::exchange_mma_16<E>,
                                                             where);
#else
  if constexpr (std::is_same_v<E, Bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// D[16 x 8] += A[16 x 8] B[8 x 8] in tf32. PTX: mma.sync.aligned.m16n8k8.row.col.f32.tf32
KDA_DEVICE void mma_m16n8k8_tf32(float (&d)[4], uint32_t const* a, uint32_t b0, uint32_t b1 KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Mma x{a, {b0, b1}, d};
  emulator::Engine::current().warp_collective<emulator::Mma>("mma.m16n8k8.tf32", ~0u, &x, emulator::exchange_mma_tf32,
                                                             where);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace kda
