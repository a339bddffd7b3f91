// CuTe's layout algebra as the oracle of every swizzle and descriptor: tile::SharedTile, the canonical layouts that
// wgmma's descriptors name (as the emulator decodes them), and what the copy engine writes.
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/pointer_flagged.hpp>
#include <cute/swizzle_layout.hpp>
#include <cute/tensor.hpp>

#include <gtest/gtest.h>

#include "tests/programs/all.h"

namespace kda::tests {
namespace {

using cute::_1;
using cute::Int;
using cute::Layout;
using cute::Shape;
using cute::Stride;
using cute::Swizzle;

/// Panels of kPanel columns: (row, (column in panel, panel)), swizzled within 1024 bytes.
template <class Tile>
auto tile_layout() {
  constexpr int kBytes = int(sizeof(typename Tile::Element)), kRowBytes = Tile::kPanel * kBytes;
  constexpr int kBits = kRowBytes == 128 ? 3 : kRowBytes == 64 ? 2 : kRowBytes == 32 ? 1 : 0;
  constexpr int kBase = kBytes == 2 ? 3 : 2;  // 16 bytes
  using Panels = Layout<Shape<Int<Tile::kRows>, Shape<Int<Tile::kPanel>, Int<Tile::kCols / Tile::kPanel>>>,
                        Stride<Int<Tile::kPanel>, Stride<_1, Int<Tile::kRows * Tile::kPanel>>>>;
  return cute::composition(Swizzle<kBits, kBase, 3>{}, Int<0>{}, Panels{});
}
template <class Tile>
void expect_tile() {
  auto const layout = tile_layout<Tile>();
  for (int r = 0; r < Tile::kRows; ++r)
    for (int c = 0; c < Tile::kCols; ++c)
      ASSERT_EQ(Tile::offset(r, c),
                sizeof(typename Tile::Element) * layout(r, cute::make_coord(c % Tile::kPanel, c / Tile::kPanel)))
          << r << ' ' << c;
}
TEST(Layouts, SharedTiles) {
  expect_tile<tile::SharedTile<Bf16, 64, 128>>();
  expect_tile<tile::SharedTile<Bf16, 64, 64>>();
  expect_tile<tile::SharedTile<Bf16, 128, 256>>();
  expect_tile<tile::SharedTile<Bf16, 32, 32>>();
  expect_tile<tile::SharedTile<Bf16, 16, 16>>();
  expect_tile<tile::SharedTile<float, 32, 128>>();
  expect_tile<tile::SharedTile<float, 32, 32>>();
  expect_tile<tile::SharedTile<float, 16, 16>>();
}

/// The fields that CuTe's own make_gmma_desc gives to a tile of 16 of the depth, with the start address of ours.
template <cute::SM90::GMMA::Major kMajor, class Atom, int kRows>
uint64_t cute_descriptor(uint32_t address) {
  constexpr bool kK = kMajor == cute::SM90::GMMA::Major::K;
  auto const shape = cute::make_shape(Int<kRows>{}, Int<kProductDepth>{});
  // MN-major: the panels of 64 rows lie behind each other, as tile::SharedTile has them.
  auto const layout = cute::tile_to_shape(
      Atom{}, shape, std::conditional_t<kK, cute::Step<cute::_1, cute::_2>, cute::Step<cute::_2, cute::_1>>{});
  auto const whole = cute::make_tensor(cute::make_smem_ptr(static_cast<cute::bfloat16_t*>(nullptr)), layout);
  auto const slice = cute::local_tile(whole, cute::make_shape(Int<kRows>{}, Int<16>{}), cute::make_coord(0, 0));
  testing::internal::CaptureStdout();  // CuTe complains that the host has no shared memory; it takes address 0
  uint64_t const descriptor = cute::SM90::GMMA::make_gmma_desc<kMajor>(slice).desc_;
  testing::internal::GetCapturedStdout();
  return (descriptor & ~uint64_t(0x3FFF)) | (address & 0x3FFFF) >> 4;
}

/// Runs on the emulator, where shared addresses exist: out[0] ours, out[1] the address it starts at.
template <class Tile, bool kMnMajor>
KDA_GLOBAL void descriptor_kernel(uint64_t* out) {
  KDA_DYNAMIC_SHARED(Tile, tile);
  out[0] = slice_descriptor<kMnMajor>(*tile, 0);
  out[1] = shared_address(tile);
}
template <bool kMnMajor, int kRows>
void expect_descriptor() {
  using Tile = std::conditional_t<kMnMajor, tile::SharedTile<Bf16, kProductDepth, kRows>,
                                  tile::SharedTile<Bf16, kRows, kProductDepth>>;
  using Atom = std::conditional_t<kMnMajor, cute::SM90::GMMA::Layout_MN_SW128_Atom<cute::bfloat16_t>,
                                  cute::SM90::GMMA::Layout_K_SW128_Atom<cute::bfloat16_t>>;
  constexpr auto kMajor = kMnMajor ? cute::SM90::GMMA::Major::MN : cute::SM90::GMMA::Major::K;
  auto const out = run(descriptor_kernel<Tile, kMnMajor>, dim3(1), dim3(1), sizeof(Tile), 2);
  uint64_t expected = cute_descriptor<kMajor, Atom, kRows>(uint32_t(out[1]));
  // Strides that an operand of this shape does not use may differ: K-major with the swizzle ignores the leading one,
  // and one panel has no next.
  uint64_t const leading = uint64_t(0x3FFF) << 16, ignored = !kMnMajor || kRows == 64 ? leading : 0;
  EXPECT_EQ(out[0] & ~ignored, expected & ~ignored) << (kMnMajor ? "MN " : "K ") << kRows;
}
TEST(Layouts, Descriptors) {
  expect_descriptor<false, 32>();
  expect_descriptor<false, 64>();
  expect_descriptor<false, 128>();
  expect_descriptor<false, 256>();
  expect_descriptor<true, 64>();
  expect_descriptor<true, 128>();
  expect_descriptor<true, 256>();
}

/// Where the emulator reads element (row, k) of an operand, against CuTe's layout of the same operand.
template <bool kMnMajor, int kRows>
void expect_elements() {
  using Tile = std::conditional_t<kMnMajor, tile::SharedTile<Bf16, kProductDepth, kRows>,
                                  tile::SharedTile<Bf16, kRows, kProductDepth>>;
  using Atom = std::conditional_t<kMnMajor, cute::SM90::GMMA::Layout_MN_SW128_Atom<cute::bfloat16_t>,
                                  cute::SM90::GMMA::Layout_K_SW128_Atom<cute::bfloat16_t>>;
  auto const layout = cute::as_position_independent_swizzle_layout(cute::tile_to_shape(
      Atom{}, cute::make_shape(Int<kRows>{}, Int<kProductDepth>{}),
      std::conditional_t<kMnMajor, cute::Step<cute::_2, cute::_1>, cute::Step<cute::_1, cute::_2>>{}));
  auto const out = run(descriptor_kernel<Tile, kMnMajor>, dim3(1), dim3(1), sizeof(Tile), 2);
  for (int k0 = 0; k0 < kProductDepth; k0 += 16) {
    // What slice_descriptor adds for the slice, as 16-byte units of the start address.
    uint64_t const step = kMnMajor ? k0 * 128 / 16 : (k0 / 64 * 64 * kRows + k0 % 64) * 2 / 16;
    for (int row = 0; row < kRows; ++row)
      for (int k = 0; k < 16; ++k) {
        uint32_t const address = emulator::wgmma_element_address(out[0] + step, row, k, kMnMajor);
        ASSERT_EQ(address - out[1], uint32_t(layout(row, k0 + k)) * 2) << row << ' ' << k0 + k;
      }
  }
}
TEST(Layouts, DescriptorElements) {
  expect_elements<false, 32>();
  expect_elements<false, 64>();
  expect_elements<false, 256>();
  expect_elements<true, 64>();
  expect_elements<true, 128>();
  expect_elements<true, 256>();
}

/// Boxes of the copy engine: CuTe's layouts of shared memory for a load of rows of 128 bytes.
TEST(Layouts, TensorBoxes) {
  using Case = TensorCase<Bf16, 2, TensorSwizzle::k128B>;
  auto const shape = Case::shape();
  auto const in = integers<Bf16>(Case::elements(), 10), out = tensor_load_boxes<Case>();
  auto const layout = cute::as_position_independent_swizzle_layout(cute::tile_to_shape(
      cute::SM90::GMMA::Layout_K_SW128_Atom<cute::bfloat16_t>{}, cute::make_shape(Int<16>{}, Int<64>{})));
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 64; ++c)
      ASSERT_EQ(to_float(out[size_t(layout(r, c))]), to_float(in[size_t(r * shape.strides[0] + c)])) << r << ' ' << c;
}

}  // namespace
}  // namespace kda::tests
