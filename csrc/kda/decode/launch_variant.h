// The launches of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/decode/layer_kernel.h"
#include "kda/decode/launch.h"
#include "platform/launch.h"

namespace kda {

/// Calls f(Shape{}) for the layout of the states of `p`.
template <class Variant, class F>
void with_decode_shape(DecodeParams const& p, bool in_pieces, F f) {
  using State = typename Variant::State;
  if (p.value_first && in_pieces) f(ValueFirstShape<State, Variant::kKeyTile, true>{});
  else if (p.value_first) f(ValueFirstShape<State, Variant::kKeyTile, false>{});
  else if (in_pieces) f(KeyFirstShape<State, Variant::kKeyTile, true>{});
  else f(KeyFirstShape<State, Variant::kKeyTile, false>{});
}

template <class Shape>
void launch_decode(char const* name, void (*kernel)(DecodeParams), DecodeParams const& p, cudaStream_t stream) {
  int64_t const tiles = (p.value_dim + Shape::kValueTile - 1) / Shape::kValueTile;
  launch(name, kernel, dim3(unsigned(p.sequences * p.value_heads * tiles)), dim3(Shape::kThreads),
         DecodeStorage<Shape>::bytes(p.tokens), stream, p);
}

template <class Variant>
void DecodeLauncher<Variant>::steps(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
    launch_decode<decltype(shape)>("decode", decode_kernel<decltype(shape)>, p, stream);
  });
}

template <class Variant>
void DecodeLauncher<Variant>::commit(DecodeCommitParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
    launch_decode<decltype(shape)>("decode_commit", decode_commit_kernel<decltype(shape)>, p, stream);
  });
}

template <class Variant>
void DecodeLauncher<Variant>::layer(DecodeLayerParams const& p, bool in_pieces, cudaStream_t stream) {
  auto const run = [&](auto shape) {
    using Shape = decltype(shape);
    launch("decode_layer", decode_layer_kernel<Shape>, dim3(unsigned(p.step.sequences * p.step.heads)),
           dim3(Shape::kThreads), sizeof(DecodeLayerStorage<Shape>), stream, p);
  };
  if (in_pieces) run(LayerShape<typename Variant::State, Variant::kKeyTile, true>{});
  else run(LayerShape<typename Variant::State, Variant::kKeyTile, false>{});
}

}  // namespace kda
