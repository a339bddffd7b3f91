// The launches of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/decode_layer/kernel.h"
#include "kda/decode_layer/launch.h"

namespace kda {

/// Calls f(Shape{}) for one whole head.
template <class Tile, class F>
void with_layer_shape(bool in_pieces, F f) {
  if (in_pieces) f(LayerShape<typename Tile::State, Tile::kKeyTile, true>{});
  else f(LayerShape<typename Tile::State, Tile::kKeyTile, false>{});
}

template <class Shape>
Kernel<DecodeLayerParams> decode_layer_kernel_of() {
  return {{"decode_layer", &typeid(Shape), Shape::kThreads, sizeof(DecodeLayerStorage<Shape>)},
          decode_layer_kernel<Shape>};
}

template <class Tile>
DecodePlan plan_decode_layer(DecodeParams const& p, bool in_pieces) {
  DecodePlan plan{};
  with_layer_shape<Tile>(in_pieces, [&](auto shape) {
    KernelLaunch const kernel = decode_layer_kernel_of<decltype(shape)>();
    plan = {int64_t(p.sequences) * p.heads, kernel.threads, p.value_dim, kernel.shared_bytes};
  });
  return plan;
}

template <class Tile>
void launch_decode_layer(DecodeLayerParams const& p, bool in_pieces, cudaStream_t stream) {
  with_layer_shape<Tile>(in_pieces, [&](auto shape) {
    launch_early(true, decode_layer_kernel_of<decltype(shape)>(), grid_of(plan_decode_layer<Tile>(p.step, in_pieces)),
                 stream, p);
  });
}

template <class Tile>
std::vector<KernelLaunch> decode_layer_kernels() {
  std::vector<KernelLaunch> all;
  for (bool in_pieces : {false, true})
    with_layer_shape<Tile>(in_pieces, [&](auto shape) { all.push_back(decode_layer_kernel_of<decltype(shape)>()); });
  return all;
}

template <class Tile>
DecodeLayerVariant describe_decode_layer() {
  return {int(sizeof(typename Tile::State)), Tile::kKeyTile, &plan_decode_layer<Tile>, &decode_layer_kernels<Tile>,
          &launch_decode_layer<Tile>};
}

}  // namespace kda
