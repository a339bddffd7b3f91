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

/// The kernels for one layout of the states; `tokens`: of a sequence. Those for trees move states element by element.
template <class Shape>
struct DecodeKernels {
  static Kernel<DecodeParams> steps(int64_t tokens) {
    return {{"decode", &typeid(Shape), Shape::kThreads, DecodeStorage<Shape>::bytes(tokens)}, decode_kernel<Shape>};
  }
  static Kernel<DecodeCommitParams> commit(int64_t tokens) {
    return {{"decode_commit", &typeid(Shape), Shape::kThreads, DecodeStorage<Shape>::bytes(tokens)},
            decode_commit_kernel<Shape>};
  }
  static Kernel<DecodeParams> tree_steps() {
    return {{"decode_tree", &typeid(Shape), Shape::kThreads, sizeof(DecodeTreeStorage<Shape>)},
            decode_tree_kernel<Shape>};
  }
  static Kernel<DecodeCommitParams> tree_commit() {
    return {{"decode_commit_tree", &typeid(Shape), Shape::kThreads, sizeof(DecodeTreeStorage<Shape>)},
            decode_commit_tree_kernel<Shape>};
  }
  /// What serves `p`.
  static Kernel<DecodeParams> steps_of(DecodeParams const& p) {
    if constexpr (!Shape::kVector)
      if (p.parents.data) return tree_steps();
    return steps(p.tokens);
  }
  static Kernel<DecodeCommitParams> commit_of(DecodeCommitParams const& p) {
    if constexpr (!Shape::kVector)
      if (p.parents.data) return tree_commit();
    return commit(p.tokens);
  }
  static Kernel<DecodeLayerParams> layer() {
    return {{"decode_layer", &typeid(Shape), Shape::kThreads, sizeof(DecodeLayerStorage<Shape>)},
            decode_layer_kernel<Shape>};
  }
};

template <class Shape>
DecodePlan decode_plan(DecodeParams const& p) {
  KernelLaunch const kernel = DecodeKernels<Shape>::steps_of(p);
  int64_t const tiles = (p.value_dim + Shape::kValueTile - 1) / Shape::kValueTile;
  return {p.sequences * p.value_heads * tiles, kernel.threads, Shape::kValueTile, kernel.shared_bytes};
}
template <class Shape>
DecodePlan decode_layer_plan(DecodeParams const& p) {
  KernelLaunch const kernel = DecodeKernels<Shape>::layer();
  return {int64_t(p.sequences) * p.heads, kernel.threads, p.value_dim, kernel.shared_bytes};
}
inline dim3 grid_of(DecodePlan const& plan) { return dim3(unsigned(plan.blocks)); }

template <class Variant>
void DecodeLauncher<Variant>::steps(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_early(true, DecodeKernels<Shape>::steps_of(p), grid_of(decode_plan<Shape>(p)), stream, p);
  });
}

template <class Variant>
void DecodeLauncher<Variant>::commit(DecodeCommitParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_early(true, DecodeKernels<Shape>::commit_of(p), grid_of(decode_plan<Shape>(p)), stream, p);
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
    launch_early(true, DecodeKernels<Shape>::layer(), grid_of(decode_layer_plan<Shape>(p.step)), stream, p);
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

template <class Variant>
std::vector<KernelLaunch> DecodeLauncher<Variant>::kernels() {
  std::vector<KernelLaunch> all;
  for (bool in_pieces : {false, true}) {
    for (bool value_first : {false, true}) {
      DecodeParams p{};
      p.value_first = value_first;
      with_decode_shape<Variant>(p, in_pieces, [&](auto shape) {
        using Kernels = DecodeKernels<decltype(shape)>;
        all.insert(all.end(), {Kernels::steps(kStagedTokens), Kernels::commit(kStagedTokens)});
        if constexpr (!decltype(shape)::kVector)
          all.insert(all.end(), {Kernels::tree_steps(), Kernels::tree_commit()});
      });
    }
    with_layer_shape<Variant>(in_pieces, [&](auto shape) { all.push_back(DecodeKernels<decltype(shape)>::layer()); });
  }
  return all;
}

}  // namespace kda
