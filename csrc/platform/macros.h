// One spelling for both compilers.
#pragma once
#include <cuda_runtime.h>  // first: its headers use threadIdx, gridDim, ... as parameter names

#include <cstdint>
#include <type_traits>

#if defined(KDA_EMULATE)
#include "emulator/engine.h"
#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define KDA_DEVICE inline
#define KDA_HOST_DEVICE inline
#define KDA_OUTLINED inline
#define KDA_GLOBAL inline
#define threadIdx (::kda::emulator::Engine::current().running->thread)
#define blockIdx (::kda::emulator::Engine::current().block_index)
#define blockDim (::kda::emulator::Engine::current().block)
#define gridDim (::kda::emulator::Engine::current().grid)
/// Last parameter of a primitive that can block: where the kernel calls it.
#define KDA_WHERE , ::kda::emulator::Location where = ::kda::emulator::Location::here()
#define KDA_WHERE_ONLY ::kda::emulator::Location where = ::kda::emulator::Location::here()
/// T* name: the block's dynamic shared memory.
#define KDA_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::kda::emulator::Engine::current().dynamic_shared())
/// T& name: one object per block and place in the source; poisoned at first, fenced for AddressSanitizer.
#define KDA_SHARED(T, name)        \
  static char name##_key;          \
  T& name = *reinterpret_cast<T*>( \
      ::kda::emulator::Engine::current().static_shared(&name##_key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T)))
#else
#define KDA_DEVICE __device__ __forceinline__
#define KDA_HOST_DEVICE __host__ __device__ __forceinline__
#define KDA_OUTLINED __device__ __noinline__  // what rarely runs: it takes no registers from what calls it
#define KDA_GLOBAL __global__
#define KDA_WHERE
#define KDA_WHERE_ONLY
#define KDA_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(1024) unsigned char kda_shared[]; \
  T* name = reinterpret_cast<T*>(kda_shared)
#define KDA_SHARED(T, name)                                       \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T)]; \
  T& name = *reinterpret_cast<T*>(name##_bytes)
#endif

// The glue in csrc/torch reaches the parameters through a plain host compiler, which has no threads to speak of.
#if defined(KDA_EMULATE) || defined(__CUDACC__)
#define KDA_DEVICE_CODE
namespace kda {
KDA_DEVICE int thread_index() {
  int const index = int(threadIdx.x);
#if !defined(KDA_EMULATE)
  __builtin_assume(index >= 0);  // so that its quotients are shifts
#endif
  return index;
}
KDA_DEVICE int lane_index() { return int(threadIdx.x % 32); }
KDA_DEVICE int warp_index() { return int(threadIdx.x / 32); }
/// thread_index(), anew at this place: what follows from it is not kept in registers from before a loop on.
KDA_DEVICE int thread_index_anew() {
  int index = int(threadIdx.x);
#if !defined(KDA_EMULATE)
  asm volatile("" : "+r"(index));
  __builtin_assume(index >= 0 && index < 1024);
#endif
  return index;
}
}  // namespace kda
#endif
