// Which variant of the convolution serves a call. Only for files compiled apart from the kernels.
#pragma once
#include "kda/select.h"
#include "kda/short_conv/launch.h"

namespace kda {

inline std::vector<ShortConvVariant> const& short_conv_variants() {
  static std::vector<ShortConvVariant> const table = {describe_short_conv<float>(), describe_short_conv<Fp16>(),
                                                      describe_short_conv<Bf16>()};
  return table;
}
inline ShortConvVariant const& select_short_conv(Dtype dtype) { return variant_of(short_conv_variants(), dtype); }

}  // namespace kda
