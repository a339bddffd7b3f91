// The compiled variants of the chunkwise operations. Each operation's dispatch.h lists those that it has.
#pragma once
#include "kda/chunk/shape.h"

namespace kda {

// 16-bit elements, K <= 64 / 128 / 256. C = 64 amortises the state products best; where it exceeds 99 KB of shared
// memory (compute capability 8.6, 8.9, 12.0) C = 32 serves. At K = 256 the state takes 128 registers of a thread: C =
// 16 leaves room for the rest.
struct Bf16K64 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k64";
  static constexpr ChunkConfig config{64, 64, 2};
};
struct Bf16K64C32 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k64_c32";
  static constexpr ChunkConfig config{32, 64, 2};
};
struct Bf16K128 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k128";
  static constexpr ChunkConfig config{64, 128, 2};
};
struct Bf16K128C32 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k128_c32";
  static constexpr ChunkConfig config{32, 128, 2};
};
struct Bf16K256 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k256";
  static constexpr ChunkConfig config{16, 256, 2};
};
struct Fp16K64 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k64";
  static constexpr ChunkConfig config{64, 64, 2};
};
struct Fp16K64C32 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k64_c32";
  static constexpr ChunkConfig config{32, 64, 2};
};
struct Fp16K128 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k128";
  static constexpr ChunkConfig config{64, 128, 2};
};
struct Fp16K128C32 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k128_c32";
  static constexpr ChunkConfig config{32, 128, 2};
};
struct Fp16K256 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k256";
  static constexpr ChunkConfig config{16, 256, 2};
};
// Hopper: the scan's products by warpgroups.
struct Bf16K64Sm90 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k64_sm90";
  static constexpr ChunkConfig config{64, 64, 3, true};
};
struct Bf16K128Sm90 {
  using Element = Bf16;
  static constexpr char const* name = "bf16_k128_sm90";
  static constexpr ChunkConfig config{64, 128, 3, true};
};
struct Fp16K64Sm90 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k64_sm90";
  static constexpr ChunkConfig config{64, 64, 3, true};
};
struct Fp16K128Sm90 {
  using Element = Fp16;
  static constexpr char const* name = "fp16_k128_sm90";
  static constexpr ChunkConfig config{64, 128, 3, true};
};
// fp32 through three tf32 products. From K = 128 on two warps share the state of 16 columns of V: a thread then has
// registers for it, and a scheduler two warps that wait for tensor cores.
struct Fp32K64 {
  using Element = float;
  static constexpr char const* name = "fp32_k64";
  static constexpr ChunkConfig config{32, 64, 2};
};
struct Fp32K128 {
  using Element = float;
  static constexpr char const* name = "fp32_k128";
  static constexpr ChunkConfig config{16, 128, 2, false, 2};
};
struct Fp32K256 {
  using Element = float;
  static constexpr char const* name = "fp32_k256";
  static constexpr ChunkConfig config{16, 256, 2, false, 2};
};

}  // namespace kda
