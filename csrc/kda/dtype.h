// Element types as values, for dispatch on the host.
#pragma once
#include "platform/types.h"

namespace kda {

enum class Dtype : int32_t { kFloat32, kFloat16, kBfloat16 };

template <class E>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<E, float>) return Dtype::kFloat32;
  else if constexpr (std::is_same_v<E, Fp16>) return Dtype::kFloat16;
  else return Dtype::kBfloat16;
}

}  // namespace kda
