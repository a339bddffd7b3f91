// Products of 16-row tiles: operands from shared memory or from the accumulators of an earlier product.
//
// One warp computes D[16 x N] += A[16 x 16] B[16 x N]. An accumulator is the 16 x 8 fp32 fragment of mma.sync: lane l
// holds rows l/4 and l/4 + 8, columns 2(l%4) and 2(l%4) + 1. Two neighbouring accumulators are, without moving
// anything between lanes, a left operand of depth 16; chains of products therefore stay in registers.
//
// The element type selects the instruction: Bf16, Fp16 (m16n8k16), Tf32 (m16n8k8, fp32 storage rounded to tf32) and
// float (three tf32 products: hi*hi + hi*lo + lo*hi).
#pragma once
#include <type_traits>

#include "platform/platform.h"
#include "tile/pair.h"
#include "tile/shared_tile.h"

namespace kda::tile {

/// Storage type of tf32 operands: fp32 whose product is taken in tf32.
struct Tf32 {
  float value;
};

using Accumulator = MmaAccumulator;

KDA_DEVICE void add(Accumulator& sum, Accumulator const& x) {
#pragma unroll
  for (int e = 0; e < 4; ++e) sum.x[e] += x.x[e];
}

/// A[16 x 16] of one warp.
template <class E>
struct LeftFragment {
  uint32_t x[4];
};
/// B[16 x 16] of one warp: two right operands of 8 columns.
template <class E>
struct RightFragment {
  uint32_t x[4];
};

/// Split of an fp32 operand: value = hi + lo, both tf32. `lo` is dropped for Tf32.
struct SplitFragment {
  uint32_t hi[8], lo[8];
};
template <>
struct LeftFragment<float> : SplitFragment {};
template <>
struct LeftFragment<Tf32> : SplitFragment {};
template <>
struct RightFragment<float> : SplitFragment {};
template <>
struct RightFragment<Tf32> : SplitFragment {};

template <class E>
inline constexpr bool kIsFp32Storage = sizeof(E) == 4;

/// hi = x rounded to tf32, lo = the rest (float only), of which products ignore the last bit. hi may lose a NaN, lo
/// then has it.
template <class E>
KDA_DEVICE void split(SplitFragment& f, int i, float x) {
  f.hi[i] = float_for_tf32(x);
  if constexpr (std::is_same_v<E, float>) {
    f.hi[i] &= 0xFFFFE000u;
    f.lo[i] = float_to_bits(x - bits_to_float(f.hi[i]));
  }
}
KDA_DEVICE float to_fp32(float x) { return x; }
KDA_DEVICE float to_fp32(Tf32 x) { return x.value; }

/// The two accumulators of columns [c, c + 8) and [c + 8, c + 16) as a left operand of depth 16.
/// For fp32 storage the depth index is permuted (t -> column 2t, t + 4 -> column 2t + 1); load_right permutes alike.
template <class E>
KDA_DEVICE LeftFragment<E> left_from(Accumulator const& a, Accumulator const& b) {
  LeftFragment<E> f;
  if constexpr (kIsFp32Storage<E>) {
    float const x[8] = {a.x[0], a.x[2], a.x[1], a.x[3], b.x[0], b.x[2], b.x[1], b.x[3]};
#pragma unroll
    for (int i = 0; i < 8; ++i) split<E>(f, i, x[i]);
  } else {
    f.x[0] = pack2<E>(a.x[0], a.x[1]);
    f.x[1] = pack2<E>(a.x[2], a.x[3]);
    f.x[2] = pack2<E>(b.x[0], b.x[1]);
    f.x[3] = pack2<E>(b.x[2], b.x[3]);
  }
  return f;
}

/// A[16 x 16] = tile[row0 + .., col0 + ..].
template <class E, class Tile>
KDA_DEVICE LeftFragment<E> load_left(Tile const& tile, int row0, int col0) {
  int const lane = lane_index();
  LeftFragment<E> f;
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const row = row0 + lane / 4 + i % 2 * 8;
      int const col = col0 ^ i / 4 * 8 ^ lane % 4 * 2 ^ i / 2 % 2;
      split<E>(f, i, to_fp32(tile.at(row, col)));
    }
  } else {
    ldmatrix_x4(f.x, &tile.at(row0 + lane % 16, col0 ^ lane / 16 * 8));
  }
  return f;
}

/// A[16 x 16] = the transpose of tile[depth0 + .., row0 + ..].
template <class E, class Tile>
KDA_DEVICE LeftFragment<E> load_left_transposed(Tile const& tile, int depth0, int row0) {
  int const lane = lane_index();
  LeftFragment<E> f;
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const depth = depth0 + i / 4 * 8 + lane % 4 * 2 + i / 2 % 2;
      split<E>(f, i, to_fp32(tile.at(depth, row0 + lane / 4 + i % 2 * 8)));
    }
  } else {
    ldmatrix_x4_trans(f.x, &tile.at(depth0 + lane % 8 + lane / 16 * 8, row0 ^ lane / 8 % 2 * 8));
  }
  return f;
}

/// Only the elements remain for which keep(row, depth) holds, both inside the 16 x 16.
template <class E, class F>
KDA_DEVICE void mask_left(LeftFragment<E>& f, F keep) {
  int const lane = lane_index();
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!keep(lane / 4 + i % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i / 2 % 2)) f.hi[i] = f.lo[i] = 0;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const row = lane / 4 + i % 2 * 8, depth = i / 2 * 8 + lane % 4 * 2;
      f.x[i] &= (keep(row, depth) ? 0xFFFFu : 0u) | (keep(row, depth + 1) ? 0xFFFF0000u : 0u);
    }
  }
}

/// A[16 x 16] = tile[row0 + .., col0 + ..] Diag(factor[col0 + ..]), `factor` in pairs.
template <class E, class Tile, class Pair>
KDA_DEVICE LeftFragment<E> load_left_scaled(Tile const& tile, int row0, int col0, Pair const* factor) {
  int const lane = lane_index();
  LeftFragment<E> f;
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const row = row0 + lane / 4 + i % 2 * 8, pair = col0 / 2 + i / 4 * 4 + lane % 4;
      float const scale = i / 2 % 2 ? factor[pair].y : factor[pair].x;
      split<E>(f, i, to_fp32(tile.at(row, 2 * pair + i / 2 % 2)) * scale);
    }
  } else {
    f = load_left<E>(tile, row0, col0);
#pragma unroll
    for (int i = 0; i < 4; ++i) f.x[i] = multiply2<E>(f.x[i], factor[col0 / 2 + i / 2 * 4 + lane % 4]);
  }
  return f;
}

/// B[16 x 16] with B[depth, n] = tile[n0 + n, depth0 + depth].
template <class E, class Tile>
KDA_DEVICE RightFragment<E> load_right(Tile const& tile, int n0, int depth0) {
  int const lane = lane_index();
  RightFragment<E> f;
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {  // (i / 4: columns n), (i / 2 % 2: depth half), a pair of the depth
      float2 const pair =
          *reinterpret_cast<float2 const*>(&tile.at(n0 + i / 4 * 8 + lane / 4, depth0 ^ i / 2 % 2 * 8 ^ lane % 4 * 2));
      split<E>(f, i, pair.x), split<E>(f, i + 1, pair.y);
    }
  } else {
    ldmatrix_x4(f.x, &tile.at(n0 + lane % 8 + lane / 16 * 8, depth0 ^ lane / 8 % 2 * 8));
  }
  return f;
}

/// B[16 x 16] with B[depth, n] = tile[depth0 + depth, n0 + n].
template <class E, class Tile>
KDA_DEVICE RightFragment<E> load_right_transposed(Tile const& tile, int depth0, int n0) {
  int const lane = lane_index();
  RightFragment<E> f;
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const row = depth0 + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
      split<E>(f, i, to_fp32(tile.at(row, n0 + i / 4 * 8 + lane / 4)));
    }
  } else {
    ldmatrix_x4_trans(f.x, &tile.at(depth0 + lane % 8 + lane / 8 % 2 * 8, n0 ^ lane / 16 * 8));
  }
  return f;
}

/// How a product of fp32 is added to D. Tensor cores truncate their sums, up to a unit in the last place of each. So
/// the small products come first, and D is added by an fp32 addition. kRounded: what the truncation of hi*hi has left
/// is computed too, and lo*lo: five products for three, where errors that all point the same way would add up.
enum class Sum { kTruncated, kRounded };

/// D += A B for fp32, 16 x 8; b: hi and lo of the two halves of the depth.
template <Sum kSum>
KDA_DEVICE void multiply_fp32(Accumulator& d, SplitFragment const& a, uint32_t const (&hi)[4],
                              uint32_t const (&lo)[4]) {
  Accumulator sum{};
#pragma unroll
  for (int s = 0; s < 4; s += 2) {
    if constexpr (kSum == Sum::kRounded) mma_m16n8k8_tf32(sum.x, a.lo + s * 2, lo[s], lo[s + 1]);
    mma_m16n8k8_tf32(sum.x, a.lo + s * 2, hi[s], hi[s + 1]);
    mma_m16n8k8_tf32(sum.x, a.hi + s * 2, lo[s], lo[s + 1]);
  }
#pragma unroll
  for (int s = 0; s < 4; s += 2) {
    if constexpr (kSum == Sum::kRounded) {
      Accumulator large{}, left;
      mma_m16n8k8_tf32(large.x, a.hi + s * 2, hi[s], hi[s + 1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) left.x[e] = -large.x[e];
      mma_m16n8k8_tf32(left.x, a.hi + s * 2, hi[s], hi[s + 1]);
      add(d, large), add(sum, left);
    } else {
      mma_m16n8k8_tf32(sum.x, a.hi + s * 2, hi[s], hi[s + 1]);
    }
  }
  add(d, sum);
}

/// D[:, 0 .. 8) += A B[:, 8 half .. 8 half + 8). The half is chosen by selects: registers cannot be indexed.
template <class E, Sum kSum = Sum::kTruncated>
KDA_DEVICE void multiply_half(Accumulator& d, LeftFragment<E> const& a, RightFragment<E> const& b, bool half) {
  if constexpr (kIsFp32Storage<E>) {
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      hi[i] = half ? b.hi[4 + i] : b.hi[i];
      if constexpr (std::is_same_v<E, float>) lo[i] = half ? b.lo[4 + i] : b.lo[i];
    }
    if constexpr (std::is_same_v<E, float>) {
      multiply_fp32<kSum>(d, a, hi, lo);
    } else {
      mma_m16n8k8_tf32(d.x, a.hi, hi[0], hi[1]);
      mma_m16n8k8_tf32(d.x, a.hi + 4, hi[2], hi[3]);
    }
  } else {
    mma_m16n8k16<E>(d.x, a.x, half ? b.x[2] : b.x[0], half ? b.x[3] : b.x[1]);
  }
}

/// D[16 x 16] += A[16 x 16] B[16 x 16]; d0 and d1 are the accumulators of the left and the right eight columns.
template <class E, Sum kSum = Sum::kTruncated>
KDA_DEVICE void multiply(Accumulator& d0, Accumulator& d1, LeftFragment<E> const& a, RightFragment<E> const& b) {
  multiply_half<E, kSum>(d0, a, b, false);
  multiply_half<E, kSum>(d1, a, b, true);
}

/// f(row and column inside the 16 x 8, two neighbours of a row, the first of them in x[e]).
template <class F>
KDA_DEVICE void for_pairs(F f) {
  int const lane = lane_index();
#pragma unroll
  for (int e = 0; e < 4; e += 2) f(lane / 4 + e / 2 * 8, lane % 4 * 2, e);
}
/// tile[row0 + .., col0 + ..) <- D[16 x 8].
template <class E, class Tile>
KDA_DEVICE void store_accumulator(Tile& tile, int row0, int col0, Accumulator const& d) {
  for_pairs([&](int row, int col, int e) {
    store_pair<E>(&tile.at(row0 + row, col0 + col), to_pair<E>(d.x[e], d.x[e + 1]));
  });
}
template <class E, class Tile>
KDA_DEVICE Accumulator load_accumulator(Tile const& tile, int row0, int col0) {
  Accumulator d;
  for_pairs([&](int row, int col, int e) {
    float2 const pair = to_float2<E>(load_pair<E>(&tile.at(row0 + row, col0 + col)));
    d.x[e] = pair.x, d.x[e + 1] = pair.y;
  });
  return d;
}

/// The transpose of tile[row0 .. row0 + 16, col0 .. col0 + 16) as accumulators: d0 has tile rows row0 .. row0 + 8 as
/// its columns, d1 the next eight.
template <class E, class Tile>
KDA_DEVICE void load_transposed(Accumulator& d0, Accumulator& d1, Tile const& tile, int row0, int col0) {
  int const lane = lane_index();
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int const row = row0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
      (i < 4 ? d0 : d1).x[i % 4] = tile.at(row, col0 + lane / 4 + i / 2 % 2 * 8);
    }
  } else {
    uint32_t x[4];
    ldmatrix_x4_trans(x, &tile.at(row0 + lane % 8 + lane / 16 * 8, col0 ^ lane / 8 % 2 * 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 const pair = unpack2<E>(x[i]);
      Accumulator& d = i < 2 ? d0 : d1;
      d.x[i % 2 * 2] = pair.x;
      d.x[i % 2 * 2 + 1] = pair.y;
    }
  }
}

/// The inverse of load_transposed. `kStmatrix`: the device has it (sm_90).
template <class E, bool kStmatrix, class Tile>
KDA_DEVICE void store_transposed(Tile& tile, int row0, int col0, Accumulator const& d0, Accumulator const& d1) {
  int const lane = lane_index();
  if constexpr (kIsFp32Storage<E>) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      tile.at(row0 + i / 4 * 8 + lane % 4 * 2 + i % 2, col0 + lane / 4 + i / 2 % 2 * 8) = (i < 4 ? d0 : d1).x[i % 4];
  } else {
    uint32_t const x[4] = {pack2<E>(d0.x[0], d0.x[1]), pack2<E>(d0.x[2], d0.x[3]), pack2<E>(d1.x[0], d1.x[1]),
                           pack2<E>(d1.x[2], d1.x[3])};
    if constexpr (kStmatrix) {
      stmatrix_x4_trans(&tile.at(row0 + lane % 8 + lane / 16 * 8, col0 ^ lane / 8 % 2 * 8), x);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_pair<E>(&tile.at(row0 + i / 2 * 8 + lane / 4, col0 + i % 2 * 8 + lane % 4 * 2), movmatrix_trans(x[i]));
    }
  }
}

}  // namespace kda::tile
