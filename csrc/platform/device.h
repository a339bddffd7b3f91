// What the host asks of the current device. Needs no nvcc.
#pragma once
#include <stdexcept>
#include <string>

#include "platform/macros.h"

namespace kda {

#if !defined(KDA_EMULATE)

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

#endif

/// What the host knows of a device before it launches there.
struct DeviceTraits {
  size_t shared_limit;    // shared memory that a block may have, in bytes
  bool has_wgmma;         // there are warpgroup products (compute capability 9.0)
  bool overlaps_kernels;  // a kernel can start before the one ahead of it has ended (launch.h, launch_early)
  int multiprocessors;
  int64_t small_workspace;  // bytes of workspace that are nothing beside the device's memory
  int64_t large_workspace;  // bytes that one should hardly take: a quarter of the memory
  int wanted_segments;      // into how many sequences are split, at most, whatever it costs; 0: as the costs say
  double copy_tb_s;         // what a copy reads and writes, together
};
inline constexpr double kCopyTbS = 3.0;  // of an H100, on which the costs were measured

/// A Hopper GPU that need not be there.
inline DeviceTraits hopper_gpu(int multiprocessors, double copy_tb_s) {
  return {227 * 1024, true, true, multiprocessors, 16 << 20, int64_t(20) << 30, 0, copy_tb_s};
}

#if defined(KDA_EMULATE)

/// Of the current device.
inline bool overlaps_kernels() { return emulator::options().has_wgmma; }
inline DeviceTraits device_traits() {
  emulator::Options const& o = emulator::options();
  return {o.shared_limit,    o.has_wgmma,         overlaps_kernels(), o.multiprocessors,
          o.small_workspace, o.device_memory / 4, o.wanted_segments,  kCopyTbS};
}

#else

/// Of the current device.
inline bool overlaps_kernels() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9; }
inline int64_t device_memory() {
  static int64_t known[64] = {};
  int64_t& value = known[current_device() & 63];
  size_t free = 0, total = 0;
  if (!value) check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo"), value = int64_t(total);
  return value;
}
inline DeviceTraits device_traits() {
  return {size_t(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>()),
          device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9,
          overlaps_kernels(),
          device_attribute<cudaDevAttrMultiProcessorCount>(),
          16 << 20,
          device_memory() / 4,
          0,
          kCopyTbS};
}

#endif

}  // namespace kda
