// The list of programs.
#pragma once
#include "tests/programs/bulk_copies.h"
#include "tests/programs/matrices.h"
#include "tests/programs/scalars.h"
#include "tests/programs/threads.h"
#include "tests/programs/warpgroup_products.h"

namespace kda::tests {

template <class Visit, class E>
void visit_products_of(Visit const& visit, char const* type) {
  auto const widths = [&](auto shared_a, auto a_mn, auto b_mn, std::string const& name) {
    constexpr bool kS = decltype(shared_a)::value, kA = decltype(a_mn)::value, kB = decltype(b_mn)::value;
    std::string const prefix = "wgmma_" + std::string(type) + name + "_n";
    visit(prefix + "32", ProductCase<E, 32, kS, kA, kB>{});
    visit(prefix + "64", ProductCase<E, 64, kS, kA, kB>{});
    visit(prefix + "128", ProductCase<E, 128, kS, kA, kB>{});
    visit(prefix + "256", ProductCase<E, 256, kS, kA, kB>{});
  };
  std::false_type const no;
  std::true_type const yes;
  widths(no, no, no, "_registers_k");
  widths(no, no, yes, "_registers_mn");
  widths(yes, no, no, "_k_k");
  widths(yes, no, yes, "_k_mn");
  widths(yes, yes, no, "_mn_k");
  widths(yes, yes, yes, "_mn_mn");
}
/// visit(name, ProductCase) for every product of warpgroups.
template <class Visit>
void visit_products(Visit const& visit) {
  visit_products_of<Visit, Bf16>(visit, "bf16");
  visit_products_of<Visit, Fp16>(visit, "fp16");
}

/// visit(name, TensorCase) for every kind of tensor map.
template <class Visit>
void visit_tensors(Visit const& visit) {
  auto const ranks = [&](auto element, auto swizzle, std::string const& name) {
    using E = decltype(element);
    constexpr TensorSwizzle kSwizzle = decltype(swizzle)::value;
    visit(name + "_2d", TensorCase<E, 2, kSwizzle>{});
    visit(name + "_3d", TensorCase<E, 3, kSwizzle>{});
    visit(name + "_4d", TensorCase<E, 4, kSwizzle>{});
  };
  std::integral_constant<TensorSwizzle, TensorSwizzle::kNone> const none;
  std::integral_constant<TensorSwizzle, TensorSwizzle::k128B> const b128;
  ranks(Bf16{}, none, "tensor_bf16"), ranks(Bf16{}, b128, "tensor_bf16_128b");
  ranks(Fp16{}, b128, "tensor_fp16_128b");
  ranks(float{}, none, "tensor_fp32"), ranks(float{}, b128, "tensor_fp32_128b");
}

inline std::vector<Program> programs() {
  std::vector<Program> list = {
      {"indices", bytes_of<indices>, 0, 0},
      {"shared_objects", bytes_of<shared_objects>, 0, 0},
      {"sync_block", bytes_of<sync_block_ring>, 0, 0},
      {"named_barriers", bytes_of<named_barrier_pipeline>, 0, 0},
      {"overlapping_kernels", bytes_of<overlapping_kernels>, 0, 0},
      {"flags", bytes_of<flags>, 0, 0},
      {"published_numbers", bytes_of<published_numbers>, 0, 0},
      {"sync_warp", bytes_of<sync_warp_halves>, 0, 0},
      {"shuffles", bytes_of<shuffles>, 0, 0},
      {"sums", bytes_of<sums>, 0, 0},
      {"registers", bytes_of<registers>, 0, 0},
      {"to_float", bytes_of<to_float_all>, 0, 0},
      {"rounding", bytes_of<rounding>, 0, 0},
      {"multiply2_bf16", bytes_of<pair_products<Bf16>>, 0, 0},
      {"multiply2_fp16", bytes_of<pair_products<Fp16>>, 0, 0},
      {"functions", bytes_of<functions>, 0x1p-21f, 0x1p-126f},
      {"log2_fast", bytes_of<logarithms>, 0x1p-21f, 1.f},
      {"float2", bytes_of<float2_products>, 0, 0},
      {"whole_stores", bytes_of<whole_stores>, 0, 0},
      {"cp_async", bytes_of<copies>, 0, 0},
      {"matrix_moves", bytes_of<matrix_moves>, 0, 0},
      {"mma_bf16", bytes_of<mma_16<Bf16, false>>, 0, 0},
      {"mma_fp16", bytes_of<mma_16<Fp16, false>>, 0, 0},
      {"mma_tf32", bytes_of<mma_tf32<false>>, 0, 0},
      {"mma_bf16_scattered", bytes_of<mma_16<Bf16, true>>, 0, 0},
      {"mma_fp16_scattered", bytes_of<mma_16<Fp16, true>>, 0, 0},
      {"mma_tf32_scattered", bytes_of<mma_tf32<true>>, 0, 0},
      {"mbarriers", bytes_of<mbarrier_pipeline>, 0, 0},
      {"bulk_copies", bytes_of<bulk_stream>, 0, 0},
      {"wgmma_overlapping", bytes_of<overlapping_products>, 0, 0},
  };
  visit_tensors([&](std::string const& name, auto tensor) {
    list.push_back({name + "_load", bytes_of<tensor_load_boxes<decltype(tensor)>>, 0, 0});
    list.push_back({name + "_store", bytes_of<tensor_store_boxes<decltype(tensor)>>, 0, 0});
  });
  visit_products([&](std::string const& name, auto product_case) {
    list.push_back({name, bytes_of<product<decltype(product_case)>>, 0, 0});
  });
  return list;
}

}  // namespace kda::tests
