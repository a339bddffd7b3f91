// Copies of 16 bytes into shared memory and the matrix moves between it and registers.
#pragma once
#include "platform/macros.h"

namespace kda {

/// Address in the shared window. PTX: cvta.to.shared
KDA_DEVICE uint32_t shared_address(void const* p) {
#if defined(KDA_EMULATE)
  return emulator::Engine::current().shared_offset(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

/// To global memory in one access: nvcc stores 16 bytes that were put together word by word as four words.
/// PTX: st.global.v4.u32
KDA_DEVICE void store_whole(uint4* to, uint4 bits) {
#if defined(KDA_EMULATE)
  *to = bits;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#endif
}
template <class Bits>
KDA_DEVICE void store_whole(Bits* to, Bits bits) {
  *to = bits;
}

/// 16 bytes from global to shared memory, of which `valid` are read and the rest is zero.
/// PTX: cp.async.cg.shared.global
KDA_DEVICE void cp_async_16(void* to, void const* from, int valid = 16 KDA_WHERE) {
#if defined(KDA_EMULATE)
  auto& engine = emulator::Engine::current();
  if (engine.shared_offset(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    engine.fail("cp.async: an address is not a multiple of 16 bytes", where);
  engine.copy_async({static_cast<char*>(to), static_cast<char const*>(from), 16, uint32_t(valid), where});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
#endif
}
/// PTX: cp.async.commit_group
KDA_DEVICE void cp_async_commit() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Until at most kPending of this thread's groups are on their way. PTX: cp.async.wait_group
template <int kPending>
KDA_DEVICE void cp_async_wait() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

#if defined(KDA_EMULATE)
namespace emulator {
struct MatrixMove {
  uint32_t row[4], result[4];  // the 16 bytes at this lane's address; its four registers
};
/// Register m of lane l: row l/4, columns 2(l%4), 2(l%4)+1 of matrix m, whose row r lies at the address of lane 8m + r.
inline KDA_NO_TSAN void exchange_ldmatrix(MatrixMove** lanes, uint32_t) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) lanes[l]->result[m] = lanes[m * 8 + l / 4]->row[l % 4];
}
inline KDA_NO_TSAN void exchange_ldmatrix_trans(MatrixMove** lanes, uint32_t) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) {
      uint32_t pair = 0;
      for (int h = 0; h < 2; ++h) {
        uint32_t const word = lanes[m * 8 + l % 4 * 2 + h]->row[l / 4 / 2];
        pair |= (l / 4 % 2 ? word >> 16 : word & 0xFFFFu) << (16 * h);
      }
      lanes[l]->result[m] = pair;
    }
}
inline void load_matrices(uint32_t (&registers)[4], void const* row, bool transpose, Location where) {
  MatrixMove a;
  Engine& engine = Engine::current();
  if (engine.shared_offset(row) % 16) engine.fail("ldmatrix: row address is not a multiple of 16 bytes", where);
  for (int i = 0; i < 4; ++i) a.row[i] = static_cast<uint32_t const*>(row)[i];  // own row: the sanitizers see it
  engine.warp_collective<MatrixMove>(transpose ? "ldmatrix.trans" : "ldmatrix", ~0u, &a,
                                     transpose ? exchange_ldmatrix_trans : exchange_ldmatrix, where);
  for (int i = 0; i < 4; ++i) registers[i] = a.result[i];
}
/// The inverse of exchange_ldmatrix.
inline KDA_NO_TSAN void exchange_stmatrix(MatrixMove** lanes, uint32_t) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) lanes[m * 8 + l / 4]->row[l % 4] = lanes[l]->result[m];
}
inline KDA_NO_TSAN void exchange_stmatrix_trans(MatrixMove** lanes, uint32_t) {
  for (int r = 0; r < 32; ++r)  // row r % 8 of matrix r / 8
    for (int c = 0; c < 8; ++c) {
      uint32_t const word = lanes[c * 4 + r % 8 / 2]->result[r / 8];
      uint32_t const value = r % 2 ? word >> 16 : word & 0xFFFFu;
      uint32_t& to = lanes[r]->row[c / 2];
      to = c % 2 ? (to & 0xFFFFu) | value << 16 : (to & 0xFFFF0000u) | value;
    }
}
inline void store_matrices(void* row, uint32_t const (&registers)[4], bool transpose, Location where) {
  MatrixMove a;
  Engine& engine = Engine::current();
  if (engine.shared_offset(row) % 16) engine.fail("stmatrix: row address is not a multiple of 16 bytes", where);
  for (int i = 0; i < 4; ++i) a.result[i] = registers[i];
  engine.warp_collective<MatrixMove>(transpose ? "stmatrix.trans" : "stmatrix", ~0u, &a,
                                     transpose ? exchange_stmatrix_trans : exchange_stmatrix, where);
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(row)[i] = a.row[i];  // own row: the sanitizers see it
}
struct MatrixTranspose {
  uint32_t row, result;
};
inline KDA_NO_TSAN void exchange_movmatrix(MatrixTranspose** lanes, uint32_t) {
  for (int l = 0; l < 32; ++l) {
    uint32_t pair = 0;
    for (int h = 0; h < 2; ++h) {  // element (2(l%4) + h, l/4) of the source
      uint32_t const word = lanes[(l % 4 * 2 + h) * 4 + l / 4 / 2]->row;
      pair |= (l / 4 % 2 ? word >> 16 : word & 0xFFFFu) << (16 * h);
    }
    lanes[l]->result = pair;
  }
}
}  // namespace emulator
#endif

/// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
/// PTX: ldmatrix.sync.aligned.m8n8.x4.shared.b16
KDA_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], void const* row KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::load_matrices(registers, row, false, where);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
/// The same, each matrix transposed. PTX: ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
KDA_DEVICE void ldmatrix_x4_trans(uint32_t (&registers)[4], void const* row KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::load_matrices(registers, row, true, where);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}
/// The inverse of ldmatrix_x4: lane l gives the address of row l % 8 of matrix l / 8. sm_90.
/// PTX: stmatrix.sync.aligned.m8n8.x4.shared.b16
KDA_DEVICE void stmatrix_x4(void* row, uint32_t const (&registers)[4] KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::store_matrices(row, registers, false, where);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
#endif
}
/// The same, each matrix transposed. PTX: stmatrix.sync.aligned.m8n8.x4.trans.shared.b16
KDA_DEVICE void stmatrix_x4_trans(void* row, uint32_t const (&registers)[4] KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::store_matrices(row, registers, true, where);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
#endif
}
/// The transpose of an 8 x 8 matrix of 16-bit elements, in registers. PTX: movmatrix.sync.aligned.m8n8.trans.b16
KDA_DEVICE uint32_t movmatrix_trans(uint32_t row KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::MatrixTranspose a{row, 0};
  emulator::Engine::current().warp_collective<emulator::MatrixTranspose>("movmatrix", ~0u, &a,
                                                                         emulator::exchange_movmatrix, where);
  return a.result;
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(row));
  return result;
#endif
}

}  // namespace kda
