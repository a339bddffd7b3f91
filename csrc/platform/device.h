// What the host asks of the current device. Needs no nvcc.
#pragma once
#include <stdexcept>
#include <string>

#include "platform/macros.h"

namespace kda {

#if defined(KDA_EMULATE)

/// Shared memory that a block may have, in bytes.
inline size_t shared_memory_limit() { return emulator::options().shared_limit; }

#else

inline void check_cuda(cudaError_t error, char const* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("kda_cuda: ") + what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

/// Shared memory that a block of the current device may have, in bytes.
inline size_t shared_memory_limit() {
  static int limit[64] = {};
  int const device = current_device();
  int& known = limit[device & 63];
  if (!known)
    check_cuda(cudaDeviceGetAttribute(&known, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device query");
  return size_t(known);
}

#endif

}  // namespace kda
