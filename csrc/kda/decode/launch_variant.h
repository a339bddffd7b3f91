// The launches of one variant; included by its file in variants/ alone.
#pragma once
#include "kda/decode/kernel.h"
#include "kda/decode/launch.h"

namespace kda {

/// Calls f(Shape{}) for the layout of the states of `p`.
template <class Tile, class F>
void with_decode_shape(DecodeParams const& p, bool in_pieces, F f) {
  using State = typename Tile::State;
  if (p.value_first && in_pieces) f(ValueFirstShape<State, Tile::kKeyTile, true>{});
  else if (p.value_first) f(ValueFirstShape<State, Tile::kKeyTile, false>{});
  else if (in_pieces) f(KeyFirstShape<State, Tile::kKeyTile, true>{});
  else f(KeyFirstShape<State, Tile::kKeyTile, false>{});
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
};

template <class Shape>
DecodePlan decode_plan(DecodeParams const& p) {
  KernelLaunch const kernel = DecodeKernels<Shape>::steps_of(p);
  int64_t const tiles = (p.value_dim + Shape::kValueTile - 1) / Shape::kValueTile;
  return {p.sequences * p.value_heads * tiles, kernel.threads, Shape::kValueTile, kernel.shared_bytes};
}
template <class Tile>
DecodePlan plan_decode(DecodeParams const& p, bool in_pieces) {
  DecodePlan plan{};
  with_decode_shape<Tile>(p, in_pieces, [&](auto shape) { plan = decode_plan<decltype(shape)>(p); });
  return plan;
}

template <class Tile>
void launch_decode(DecodeParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Tile>(p, in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_early(true, DecodeKernels<Shape>::steps_of(p), grid_of(decode_plan<Shape>(p)), stream, p);
  });
}

template <class Tile>
void launch_decode_commit(DecodeCommitParams const& p, bool in_pieces, cudaStream_t stream) {
  with_decode_shape<Tile>(p, in_pieces, [&](auto shape) {
    using Shape = decltype(shape);
    launch_early(true, DecodeKernels<Shape>::commit_of(p), grid_of(decode_plan<Shape>(p)), stream, p);
  });
}

template <class Tile>
std::vector<KernelLaunch> decode_kernels() {
  std::vector<KernelLaunch> all;
  for (bool in_pieces : {false, true})
    for (bool value_first : {false, true}) {
      DecodeParams p{};
      p.value_first = value_first;
      with_decode_shape<Tile>(p, in_pieces, [&](auto shape) {
        using Kernels = DecodeKernels<decltype(shape)>;
        all.insert(all.end(), {Kernels::steps(kStagedTokens), Kernels::commit(kStagedTokens)});
        if constexpr (!decltype(shape)::kVector) all.insert(all.end(), {Kernels::tree_steps(), Kernels::tree_commit()});
      });
    }
  return all;
}

template <class Tile>
DecodeVariant describe_decode() {
  return {int(sizeof(typename Tile::State)),
          Tile::kKeyTile,
          &plan_decode<Tile>,
          &decode_kernels<Tile>,
          &launch_decode<Tile>,
          &launch_decode_commit<Tile>};
}

}  // namespace kda
