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

/// A Hopper GPU to plan for, of which the current device then is not asked; nothing may be launched meanwhile.
struct PlannedDevice {
  int multiprocessors;  // 0: the current device
  double copy_tb_s;
};
inline thread_local PlannedDevice planned_device{};
inline bool is_planned() { return planned_device.multiprocessors != 0; }

namespace current {  // as below

#if defined(KDA_EMULATE)

inline size_t shared_memory_limit() { return emulator::options().shared_limit; }
inline bool has_wgmma() { return emulator::options().has_wgmma; }
inline bool overlaps_kernels() { return emulator::options().has_wgmma; }
inline int multiprocessors() { return emulator::options().multiprocessors; }
inline int64_t small_workspace() { return emulator::options().small_workspace; }
inline int wanted_segments() { return emulator::options().wanted_segments; }

#else

inline size_t shared_memory_limit() { return size_t(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>()); }
inline bool has_wgmma() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }
inline bool overlaps_kernels() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9; }
inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }
inline int64_t small_workspace() { return 16 << 20; }
inline int wanted_segments() { return 0; }

#endif

}  // namespace current

/// Shared memory that a block may have, in bytes.
inline size_t shared_memory_limit() { return is_planned() ? 227 * 1024 : current::shared_memory_limit(); }
/// Whether there are warpgroup products (compute capability 9.0).
inline bool has_wgmma() { return is_planned() || current::has_wgmma(); }
/// Whether a kernel can start before the one ahead of it has ended (launch.h, launch_early).
inline bool overlaps_kernels() { return is_planned() || current::overlaps_kernels(); }
inline int multiprocessors() { return is_planned() ? planned_device.multiprocessors : current::multiprocessors(); }
/// What a copy reads and writes, together; unless planned, of an H100, whose times ScanCost has.
inline double copy_tb_s() { return is_planned() ? planned_device.copy_tb_s : 3.0; }
/// Bytes of workspace that are nothing beside the device's memory.
inline int64_t small_workspace() { return is_planned() ? 16 << 20 : current::small_workspace(); }
/// Into how many segments sequences are split, at most, whatever it costs; 0: as the costs say.
inline int wanted_segments() { return is_planned() ? 0 : current::wanted_segments(); }

}  // namespace kda
