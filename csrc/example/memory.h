// Memory of the device, and its stream. With kda_cuda::emulated the device is the host.
#pragma once
#include <cstring>
#include <new>

#include "platform/device.h"

/// Owns memory that kernels can reach.
class DeviceMemory {
 public:
#if defined(KDA_EMULATE)
  explicit DeviceMemory(size_t bytes) : bytes_(bytes), data_(::operator new(bytes, kAlignment)) {}
  ~DeviceMemory() { ::operator delete(data_, kAlignment); }
  void read_from(void const* host) const { std::memcpy(data_, host, bytes_); }
  void write_to(void* host) const { std::memcpy(host, data_, bytes_); }
#else
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) { kda::check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  ~DeviceMemory() { cudaFree(data_); }
  void read_from(void const* host) const {
    kda::check_cuda(cudaMemcpy(data_, host, bytes_, cudaMemcpyHostToDevice), "upload");
  }
  void write_to(void* host) const {  // what stands in the default stream ends first
    kda::check_cuda(cudaMemcpy(host, data_, bytes_, cudaMemcpyDeviceToHost), "download");
  }
#endif
  DeviceMemory(DeviceMemory const&) = delete;
  DeviceMemory& operator=(DeviceMemory const&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{256};  // as cudaMalloc's
  size_t bytes_;
  void* data_ = nullptr;
};
