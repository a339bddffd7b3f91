// cp.async, ldmatrix, stmatrix, movmatrix, mma.sync.
#pragma once
#include "tests/programs/program.h"

namespace kda::tests {

// ---- stores ----------------------------------------------------------------------------------------------------

/// 16 bytes that were put together word by word, from each thread; and two words at once.
KDA_GLOBAL void whole_stores_kernel(uint4* out) {
  uint32_t const i = uint32_t(thread_index());
  store_whole(out + i, uint4{i, i * i, i << 16, ~i});
  uint2* const halves = reinterpret_cast<uint2*>(out + 64);
  store_whole(halves + 2 * i, uint2{i + 1000, i});
  store_whole(halves + 2 * i + 1, uint2{i, i ^ 0xABCDu});
}
inline std::vector<uint4> whole_stores() { return run(whole_stores_kernel, dim3(1), dim3(64), 0, 128); }

// ---- cp.async --------------------------------------------------------------------------------------------------

struct CopyStages {
  uint4 piece[3][32];
};
/// Three groups; `valid` bytes of each piece, 0 to 16. What wait<kPending> promises is read as soon as it is there.
KDA_GLOBAL void cp_async_kernel(uint4* out, uint4 const* in) {
  KDA_SHARED(CopyStages, s);
  int const lane = lane_index();
  for (int g = 0; g < 3; ++g) {
    if (g < 2) cp_async_16(&s.piece[g][lane], in + g * 32 + lane, (lane + g) % 17);
    else cp_async_16(&s.piece[g][lane], in + g * 32 + lane);
    cp_async_commit();
  }
  cp_async_wait<2>();
  out[lane] = s.piece[0][lane];
  cp_async_wait<0>();
  sync_warp();
  out[32 + lane] = s.piece[1][lane ^ 1];
  out[64 + lane] = s.piece[2][lane ^ 3];
}
inline std::vector<uint4> copy_input() {
  std::vector<uint32_t> const x = words(96 * 4, 5);
  std::vector<uint4> pieces(96);
  std::memcpy(pieces.data(), x.data(), 96 * 16);
  return pieces;
}
inline std::vector<uint4> copies() {
  Buffer<uint4> const in(copy_input());
  return run(cp_async_kernel, dim3(1), dim3(32), 0, 96, static_cast<uint4 const*>(in.data()));
}

// ---- matrix moves ----------------------------------------------------------------------------------------------

/// Four 8 x 8 matrices of 16-bit values 64 m + 8 r + c.
struct Matrices {
  alignas(16) uint16_t value[4][8][8];
};
struct MatrixPair {
  Matrices at[2];
};
/// Registers of ldmatrix (plain, transposed), of movmatrix applied to its four, and the image that stmatrix leaves
/// (plain, transposed) from the registers of ldmatrix.
KDA_GLOBAL void matrices_kernel(uint32_t* out) {
  KDA_SHARED(Matrices, from);
  KDA_SHARED(MatrixPair, to);
  int const lane = lane_index();
  for (int i = lane; i < 256; i += 32) (&from.value[0][0][0])[i] = uint16_t(i * 257);
  sync_warp();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, &from.value[lane / 8][lane % 8][0]);
  ldmatrix_x4_trans(y, &from.value[lane / 8][lane % 8][0]);
  stmatrix_x4(&to.at[0].value[lane / 8][lane % 8][0], x);
  stmatrix_x4_trans(&to.at[1].value[lane / 8][lane % 8][0], x);
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    out[i * 32 + lane] = x[i];
    out[128 + i * 32 + lane] = y[i];
    out[256 + i * 32 + lane] = movmatrix_trans(x[i]);
    out[384 + i * 32 + lane] = reinterpret_cast<uint32_t const*>(&to.at[0])[i * 32 + lane];
    out[512 + i * 32 + lane] = reinterpret_cast<uint32_t const*>(&to.at[1])[i * 32 + lane];
  }
  out[640 + lane] = shared_address(&to.at[1]) - shared_address(&to.at[0]) + lane;
}
inline std::vector<uint32_t> matrix_moves() { return run(matrices_kernel, dim3(1), dim3(32), 0, 672); }

// ---- mma.sync --------------------------------------------------------------------------------------------------

/// D = C + A B, A [16 x 16] row-major, B [8 x 16] (column n contiguous).
template <class E>
KDA_GLOBAL void mma_kernel(float* out, E const* a, E const* b, float const* c) {
  int const group = lane_index() / 4, pair = lane_index() % 4 * 2;
  auto const word = [](E const* p) { return *reinterpret_cast<uint32_t const*>(p); };
  uint32_t const x[4] = {word(a + group * 16 + pair), word(a + (group + 8) * 16 + pair),
                         word(a + group * 16 + pair + 8), word(a + (group + 8) * 16 + pair + 8)};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(group + i / 2 * 8) * 8 + pair + i % 2];
  mma_m16n8k16<E>(d, x, word(b + group * 16 + pair), word(b + group * 16 + pair + 8));
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + pair + i % 2] = d[i];
}
template <class E, bool kScattered>
std::vector<float> mma_16() {
  Buffer<E> const a(numbers<E, kScattered>(256, 6)), b(numbers<E, kScattered>(128, 7));
  Buffer<float> const c(numbers<float, kScattered>(128, 8));
  return run(mma_kernel<E>, dim3(1), dim3(32), 0, 128, static_cast<E const*>(a.data()), static_cast<E const*>(b.data()),
             static_cast<float const*>(c.data()));
}
/// The same in tf32, depth 8.
KDA_GLOBAL void mma_tf32_kernel(float* out, float const* a, float const* b, float const* c) {
  int const group = lane_index() / 4, k = lane_index() % 4;
  uint32_t x[4];
  for (int i = 0; i < 4; ++i) x[i] = float_to_tf32(a[(group + i % 2 * 8) * 8 + k + i / 2 * 4]);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(group + i / 2 * 8) * 8 + k * 2 + i % 2];
  mma_m16n8k8_tf32(d, x, float_for_tf32(b[group * 8 + k]), float_for_tf32(b[group * 8 + k + 4]));
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + k * 2 + i % 2] = d[i];
}
template <bool kScattered>
std::vector<float> mma_tf32() {
  Buffer<float> const a(numbers<float, kScattered>(128, 6)), b(numbers<float, kScattered>(64, 7));
  Buffer<float> const c(numbers<float, kScattered>(128, 8));
  return run(mma_tf32_kernel, dim3(1), dim3(32), 0, 128, static_cast<float const*>(a.data()),
             static_cast<float const*>(b.data()), static_cast<float const*>(c.data()));
}

}  // namespace kda::tests
