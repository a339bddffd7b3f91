// The launches for one element type; included by the files in variants/ alone.
#pragma once
#include "kda/short_conv/backward.h"
#include "kda/short_conv/launch.h"

namespace kda {

template <class Shape>
struct ShortConvFwdKernel {
  static Kernel<ShortConvFwdParams> get() {
    return {{"short_conv_fwd", &typeid(Shape), kConvThreads, 0}, short_conv_fwd_kernel<Shape>};
  }
};
template <class Shape>
struct ShortConvBwdKernel {
  static Kernel<ShortConvBwdParams> get() {
    return {{"short_conv_bwd", &typeid(Shape), kConvThreads, 0}, short_conv_bwd_kernel<Shape>};
  }
};
inline Kernel<ShortConvBwdParams> short_conv_reduce() {
  return {{"short_conv_reduce", &typeid(void), kConvSumThreads, 0}, short_conv_reduce_kernel};
}

/// Calls f(Shape{}): pieces of four channels and four taps or any number, or any call by single channels.
template <class E, bool kBackward, class F>
void for_each_conv_shape(F f) {
  constexpr int kAhead = sizeof(E) == 4 ? 3 : 6;  // of four taps: a multiple of 3, so that registers need no turning
  f(ConvShape<E, 4, 4, 4, kAhead>{}), f(ConvShape<E, 2, 8, 4, 2>{}), f(ConvShape<E, 2, 8, 1, 2>{});
}
/// The one that serves p.
template <class E, bool kBackward, class F>
void with_conv_shape(ShortConvCall const& p, F f) {
  for_each_conv_shape<E, kBackward>([&](auto shape) {
    using Shape = decltype(shape);
    bool const serves = Shape::kChannels == 1 || (p.taps == 4) == (Shape::kTaps == 4);
    if (serves && p.in_pieces == (Shape::kChannels > 1)) f(shape);
  });
}
inline dim3 conv_grid(ShortConvCall const& p) {
  return dim3(unsigned(p.run_blocks + (p.plan.cu_seqlens ? kConvClearBlocks : 0)) * unsigned(p.channel_blocks));
}

template <class E, bool kBackward>
void plan_short_conv(ShortConvCall& p, int64_t batch_tokens) {
  with_conv_shape<E, kBackward>(p, [&](auto shape) {
    constexpr int kChannels = decltype(shape)::kBlockChannels;
    p.channel_blocks = (p.channels + kChannels - 1) / kChannels;
    constexpr int kAtOnce = kBackward ? decltype(shape)::kBackwardBlocks : decltype(shape)::kForwardBlocks;
    p.plan.chunk = conv_run_tokens(batch_tokens, p.channel_blocks, kAtOnce);
    p.run_blocks = conv_run_blocks(p.plan);
  });
}
template <class E>
void launch_short_conv_fwd(ShortConvFwdParams const& p, cudaStream_t stream) {
  with_conv_shape<E, false>(p, [&](auto shape) {
    using Shape = decltype(shape);
    launch(ShortConvFwdKernel<Shape>::get(), conv_grid(p), stream, p);
  });
}
template <class E>
void launch_short_conv_bwd(ShortConvBwdParams const& p, cudaStream_t stream) {
  with_conv_shape<E, true>(p, [&](auto shape) {
    using Shape = decltype(shape);
    launch(ShortConvBwdKernel<Shape>::get(), conv_grid(p), stream, p);
  });
  launch_early(true, short_conv_reduce(), dim3(column_sum_blocks(int64_t(p.taps + 1) * p.channels, kConvSumColumns)),
               stream, p);
}

template <class E>
std::vector<KernelLaunch> short_conv_kernels() {
  std::vector<KernelLaunch> all{short_conv_reduce()};
  for_each_conv_shape<E, false>([&](auto shape) { all.push_back(ShortConvFwdKernel<decltype(shape)>::get()); });
  for_each_conv_shape<E, true>([&](auto shape) { all.push_back(ShortConvBwdKernel<decltype(shape)>::get()); });
  return all;
}

template <class E>
ShortConvVariant describe_short_conv() {
  return {dtype_of<E>(),
          &short_conv_kernels<E>,
          &plan_short_conv<E, false>,
          &plan_short_conv<E, true>,
          &launch_short_conv_fwd<E>,
          &launch_short_conv_bwd<E>};
}

}  // namespace kda
