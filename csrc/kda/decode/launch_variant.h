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
DecodePlan decode_plan(DecodeParams const& p) {
  int64_t const tiles = (p.value_dim + Shape::kValueTile - 1) / Shape::kValueTile;
  return {p.sequences * p.value_heads * tiles, Shape::kThreads, Shape::kValueTile,
          DecodeStorage<Shape>::bytes(p.tokens)};
}
template <class Shape>
DecodePlan decode_layer_plan(DecodeParams const& p) {
  return {int64_t(p.sequences) * p.heads, Shape::kThreads, p.value_dim, sizeof(DecodeLayerStorage<Shape>)};
}

template <class Params>
void launch_decode(char const* name, void (*kernel)(Params), DecodePlan const& plan, Params const& p,
                   cudaStream_t stream) {
  launch_early(true, name, kernel, dim3(unsigned(plan.blocks)), dim3(unsigned(plan.threads)), plan.shared_bytes, stream,
               p);
}

template <class Variant>
void DecodeLauncher<Variant>::steps(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_decode("decode", decode_kernel<Shape>, decode_plan<Shape>(p), p, stream);
  });
}

template <class Variant>
void DecodeLauncher<Variant>::commit(DecodeCommitParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_decode("decode_commit", decode_commit_kernel<Shape>, decode_plan<Shape>(p), p, stream);
  });
}

/// The same for one whole head.
template <class Variant, class F>
void with_layer_shape(bool in_pieces, F f) {
  if (in_pieces) f(LayerShape<typename Variant::State, Variant::kKeyTile, true>{});
  else f(LayerShape<typename Variant::State, Variant::kKeyTile, false>{});
}

template <class Variant>
void DecodeLauncher<Variant>::layer(DecodeLayerParams const& p, bool in_pieces, cudaStream_t stream) {
  with_layer_shape<Variant>(in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_decode("decode_layer", decode_layer_kernel<Shape>, decode_layer_plan<Shape>(p.step), p, stream);
  });
}

template <class Variant>
DecodePlan DecodeLauncher<Variant>::plan(DecodeParams const& p, bool in_pieces) {
  DecodePlan plan{};
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) { plan = decode_plan<decltype(shape)>(p); });
  return plan;
}
template <class Variant>
DecodePlan DecodeLauncher<Variant>::layer_plan(DecodeParams const& p, bool in_pieces) {
  DecodePlan plan{};
  with_layer_shape<Variant>(in_pieces, [&](auto shape) { plan = decode_layer_plan<decltype(shape)>(p); });
  return plan;
}

}  // namespace kda
