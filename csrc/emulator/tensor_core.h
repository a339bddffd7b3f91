// How tensor cores add: the products of one step and the accumulator as fixed-point numbers, cut off below the largest.
#pragma once

namespace kda::emulator {

/// A step takes `step_bytes` of a row of A. Its products (exact) and the accumulator are aligned to the largest of
/// their exponents and truncated to `fraction_bits` below it, added exactly, and the sum is truncated to fp32. Bit by
/// bit in the ranges of the formats' normal numbers, as far as is known: Fasi et al., "Numerical behavior of NVIDIA
/// tensor cores" (2021); Xie et al., "MMA-Sim" (arXiv 2511.10909); Khattak and Mikaitis, "Accurate Models of NVIDIA
/// Tensor Cores" (arXiv 2512.07004). Here nothing below 2^-126 is kept.
struct TensorCore {
  int fraction_bits, step_bytes;
};
inline constexpr TensorCore kAmpereCore{24, 16}, kHopperCore{25, 32};
/// That of the emulated device.
TensorCore tensor_core();

/// D[rows x 8] += A[rows x kDepth] B[kDepth x 8]: 32 bytes of 16-bit or tf32 elements, which are kDepth = 16 or 8.
template <int kDepth>
void add_products(TensorCore core, int rows, float const (*a)[kDepth], float const (*b)[8], float (*d)[8]);

}  // namespace kda::emulator
