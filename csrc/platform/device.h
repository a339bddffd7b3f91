// What the host asks of the current device. Needs no nvcc.
#pragma once
#include <stdexcept>
#include <string>

#include "platform/macros.h"

namespace kda {

#if defined(KDA_EMULATE)

/// Shared memory that a block may have, in bytes.
inline size_t shared_memory_limit() { return emulator::options().shared_limit; }
/// Whether the device has warpgroup products (compute capability 9.0).
inline bool has_wgmma() { return emulator::options().has_wgmma; }
inline bool overlaps_kernels() { return emulator::options().has_wgmma; }
inline int multiprocessors() { return emulator::options().multiprocessors; }
/// Bytes of workspace that are nothing beside the device's memory.
inline int64_t small_workspace() { return emulator::options().small_workspace; }
/// Into how many segments sequences are split, at most, whatever it costs; 0: as the costs say.
inline int wanted_segments() { return emulator::options().wanted_segments; }

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

/// An attribute of the current device, asked of the driver once per device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static int known[64] = {};
  int const device = current_device();
  int& value = known[device & 63];
  if (!value) check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
  return value;
}

/// Shared memory that a block of the current device may have, in bytes.
inline size_t shared_memory_limit() { return size_t(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>()); }
/// Bytes of workspace that are nothing beside the device's memory.
inline int64_t small_workspace() { return 16 << 20; }
/// Into how many segments sequences are split, at most, whatever it costs; 0: as the costs say.
inline int wanted_segments() { return 0; }
/// Whether the current device has warpgroup products (compute capability 9.0).
inline bool has_wgmma() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }
/// Whether a kernel can start before the one ahead of it has ended (launch.h, launch_early).
inline bool overlaps_kernels() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9; }
inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

#endif

}  // namespace kda
