// Tensor maps: how the copy engine (TMA) sees a tensor in global memory. Made on the host; needs no nvcc.
#pragma once
#include <stdexcept>
#include <string>

#include "platform/device.h"
#include "platform/types.h"
#if !defined(KDA_EMULATE)
#include <cuda.h>
#endif

namespace kda {

/// How a box lies in shared memory: rows packed, in the order of the dimensions. k128B: rows of 128 bytes, piece p (of
/// 16 bytes) of row r in the place of piece p ^ r % 8 (a panel of tile::SharedTile; wgmma's 128-byte swizzle).
enum class TensorSwizzle { kNone, k128B };

#if defined(KDA_EMULATE)
/// The host twin of CUtensorMap.
struct alignas(64) TensorMap {
  char* global;
  int rank, element_bytes;
  int64_t size[4], stride_bytes[4];
  int box[4];
  TensorSwizzle swizzle;
};
#else
using TensorMap = CUtensorMap;
#endif

namespace tensor_map {

[[noreturn]] inline void reject(std::string const& what) { throw std::invalid_argument("make_tensor_map: " + what); }

/// The encoder's own conditions, said once for the device and for its twin.
inline void check(void const* global, int element_bytes, int rank, int64_t const* sizes, int64_t const* strides,
                  int const* box, TensorSwizzle swizzle) {
  if (reinterpret_cast<uintptr_t>(global) % 16) reject("the address is not a multiple of 16 bytes");
  for (int i = 0; i < rank; ++i) {
    std::string const dimension = "dimension " + std::to_string(i);
    if (sizes[i] < 1 || sizes[i] > int64_t(1) << 32) reject(dimension + " has size " + std::to_string(sizes[i]));
    if (box[i] < 1 || box[i] > 256) reject(dimension + " of the box has size " + std::to_string(box[i]));
    if (i == 0) continue;
    int64_t const bytes = strides[i - 1] * element_bytes;
    if (bytes <= 0 || bytes % 16 || bytes >= int64_t(1) << 40)
      reject(dimension + " has a stride of " + std::to_string(bytes) + " bytes, not a multiple of 16 below 2^40");
  }
  int const row_bytes = box[0] * element_bytes;
  if (row_bytes % 16) reject("a row of the box has " + std::to_string(row_bytes) + " bytes, not a multiple of 16");
  if (swizzle == TensorSwizzle::k128B && row_bytes != 128)
    reject("a row of the box has " + std::to_string(row_bytes) + " bytes, not the 128 of the swizzle");
}

#if !defined(KDA_EMULATE)
/// The driver's encoder, found once: linking with the driver would make the library need one to load.
inline auto encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status),
               "cuTensorMapEncodeTiled");
    if (!function || status != cudaDriverEntryPointSuccess)
      throw std::runtime_error("kda_cuda: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}
#endif

}  // namespace tensor_map

/// The tensor of `sizes` elements at `global`, dimension 0 innermost and contiguous, `strides` elements between the
/// neighbours of dimensions 1, 2, ...; a copy moves boxes of `box` elements. Reads beyond the tensor give zeros, writes
/// there are dropped. Throws std::invalid_argument where the copy engine could not (16-byte strides and rows, ...).
/// Kernels take it as `__grid_constant__ TensorMap const`, or inside such a struct. Driver: cuTensorMapEncodeTiled
template <class E, int kRank>
TensorMap make_tensor_map(E const* global, int64_t const (&sizes)[kRank], int64_t const (&strides)[kRank - 1],
                          int const (&box)[kRank], TensorSwizzle swizzle) {
  static_assert(kRank >= 2 && kRank <= 4);
  tensor_map::check(global, int(sizeof(E)), kRank, sizes, strides, box, swizzle);
  TensorMap map{};
#if defined(KDA_EMULATE)
  map.global = reinterpret_cast<char*>(const_cast<E*>(global));
  map.rank = kRank, map.element_bytes = int(sizeof(E)), map.swizzle = swizzle;
  for (int i = 0; i < kRank; ++i) {
    map.size[i] = sizes[i], map.box[i] = box[i];
    map.stride_bytes[i] = (i ? strides[i - 1] : 1) * int64_t(sizeof(E));
  }
#else
  constexpr CUtensorMapDataType kType = std::is_same_v<E, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                        : std::is_same_v<E, Fp16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static_assert(std::is_same_v<E, float> || std::is_same_v<E, Fp16> || std::is_same_v<E, Bf16>);
  cuuint64_t global_size[kRank], stride_bytes[kRank - 1];
  cuuint32_t box_size[kRank], element_stride[kRank];
  for (int i = 0; i < kRank; ++i) {
    global_size[i] = cuuint64_t(sizes[i]), box_size[i] = cuuint32_t(box[i]), element_stride[i] = 1;
    if (i) stride_bytes[i - 1] = cuuint64_t(strides[i - 1]) * sizeof(E);
  }
  CUresult const result =
      tensor_map::encoder()(&map, kType, kRank, const_cast<E*>(global), global_size, stride_bytes, box_size,
                            element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            swizzle == TensorSwizzle::k128B ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) tensor_map::reject("the driver's encoder failed with error " + std::to_string(result));
#endif
  return map;
}

}  // namespace kda
