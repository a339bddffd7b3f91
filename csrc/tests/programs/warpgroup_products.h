// wgmma: every width, both places of A, both majors of each operand in shared memory.
#pragma once
#include "tests/programs/program.h"
#include "tile/shared_tile.h"

namespace kda::tests {

inline constexpr int kProductDepth = 128;

template <class E, int kWidth, bool kSharedA, bool kAMn, bool kBMn>
struct ProductCase {
  using Element = E;
  static constexpr int kN = kWidth;
  static constexpr bool kAShared = kSharedA, kAMnMajor = kAMn, kBMnMajor = kBMn;
};
template <class Case>
struct ProductStorage {
  using E = typename Case::Element;
  static constexpr int kPadded = Case::kN < 64 ? 64 : Case::kN;  // MN-major panels are 64 wide
  std::conditional_t<Case::kAMnMajor, tile::SharedTile<E, kProductDepth, 64>, tile::SharedTile<E, 64, kProductDepth>> a;
  std::conditional_t<Case::kBMnMajor, tile::SharedTile<E, kProductDepth, kPadded>,
                     tile::SharedTile<E, Case::kN, kProductDepth>>
      b;
};

/// Descriptor of the 16 of the depth from `k`: of a tile [rows, depth] (K-major) or [depth, rows] (MN-major).
template <bool kMnMajor, class Tile>
KDA_DEVICE uint64_t slice_descriptor(Tile const& tile, int k) {
  if constexpr (kMnMajor) return wgmma_descriptor(&tile.data[k * Tile::kPanel], Tile::kPanelBytes, 1024);
  else return wgmma_descriptor(&tile.data[k / Tile::kPanel * Tile::kPanel * Tile::kRows + k % Tile::kPanel], 0, 1024);
}

/// D[64 x N] = A B, then += A B over the first half of the depth in a second group; a [64, depth], b [depth, N] in
/// global memory, row-major.
template <class Case>
KDA_GLOBAL void __launch_bounds__(128)
    product_kernel(float* out, typename Case::Element const* a, typename Case::Element const* b) {
  using E = typename Case::Element;
  constexpr int kN = Case::kN;
  KDA_DYNAMIC_SHARED(ProductStorage<Case>, s);
  int const t = thread_index(), row = t / 32 * 16 + lane_index() / 4, pair = lane_index() % 4 * 2;
  for (int i = t; i < 64 * kProductDepth; i += 128) {
    int const m = i / kProductDepth, k = i % kProductDepth;
    (Case::kAMnMajor ? s->a.at(k, m) : s->a.at(m, k)) = a[i];
  }
  for (int i = t; i < kN * kProductDepth; i += 128) {
    int const k = i / kN, n = i % kN;
    (Case::kBMnMajor ? s->b.at(k, n) : s->b.at(n, k)) = b[i];
  }
  fence_proxy_async();
  sync_block();
  MmaAccumulator d[kN / 8];
  uint32_t left[kProductDepth / 16][4];
  if constexpr (!Case::kAShared)
    for (int k = 0; k < kProductDepth / 16; ++k)
      for (int i = 0; i < 4; ++i)
        left[k][i] =
            *reinterpret_cast<uint32_t const*>(a + (row + i % 2 * 8) * kProductDepth + k * 16 + pair + i / 2 * 8);
  auto const start = [&](int depth, bool add) {
#pragma unroll
    for (int k = 0; k < kProductDepth / 16; ++k) {
      if (k * 16 >= depth) continue;
      uint64_t const right = slice_descriptor<Case::kBMnMajor>(s->b, k * 16);
      if constexpr (Case::kAShared)
        wgmma_m64k16_shared<E, kN, Case::kAMnMajor, Case::kBMnMajor>(d, slice_descriptor<Case::kAMnMajor>(s->a, k * 16),
                                                                     right, add || k > 0);
      else wgmma_m64k16<E, kN, Case::kBMnMajor>(d, left[k], right, add || k > 0);
    }
    wgmma_commit();
  };
  wgmma_fence();
  start(kProductDepth, false);
  start(kProductDepth / 2, true);
  wgmma_wait<0>();
  for (int c = 0; c < kN / 8; ++c)
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * kN + c * 8 + pair + i % 2] = d[c].x[i];
}
template <class Case>
std::vector<float> product() {
  using E = typename Case::Element;
  Buffer<E> const a(integers<E>(64 * kProductDepth, 11)), b(integers<E>(kProductDepth * Case::kN, 12));
  return run(product_kernel<Case>, dim3(1), dim3(128), sizeof(ProductStorage<Case>), size_t(64) * Case::kN,
             static_cast<E const*>(a.data()), static_cast<E const*>(b.data()));
}

/// Two products in flight at once; the first is used while the second runs.
template <class Case>
KDA_GLOBAL void __launch_bounds__(128) overlap_kernel(float* out, typename Case::Element const* b) {
  using E = typename Case::Element;
  KDA_DYNAMIC_SHARED(ProductStorage<Case>, s);
  int const t = thread_index();
  for (int i = t; i < 64 * kProductDepth; i += 128) {
    s->a.at(i / kProductDepth, i % kProductDepth) = b[i];
    s->b.at(i / kProductDepth, i % kProductDepth) = b[i];
  }
  fence_proxy_async();
  sync_block();
  MmaAccumulator x[8], y[8];
  wgmma_fence();
  wgmma_m64k16_shared<E, 64, false, false>(x, slice_descriptor<false>(s->a, 0), slice_descriptor<false>(s->b, 0),
                                           false);
  wgmma_commit();
  wgmma_m64k16_shared<E, 64, false, false>(y, slice_descriptor<false>(s->a, 16), slice_descriptor<false>(s->b, 64),
                                           false);
  wgmma_commit();
  wgmma_wait<1>();
  for (int i = 0; i < 32; ++i) out[i * 128 + t] = x[i / 4].x[i % 4];
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[(32 + i) * 128 + t] = y[i / 4].x[i % 4];
}
using OverlapCase = ProductCase<Bf16, 64, true, false, false>;
inline std::vector<float> overlapping_products() {
  Buffer<Bf16> const b(integers<Bf16>(64 * kProductDepth, 13));
  return run(overlap_kernel<OverlapCase>, dim3(1), dim3(128), sizeof(ProductStorage<OverlapCase>), 64 * 128,
             static_cast<Bf16 const*>(b.data()));
}

}  // namespace kda::tests
