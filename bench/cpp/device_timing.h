// Device memory, CUDA graphs and events for the microbenchmarks.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

inline void check(cudaError_t error, char const* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, bytes ? bytes : 1), "cudaMalloc"); }
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  DeviceBuffer(DeviceBuffer const&) = delete;
  ~DeviceBuffer() { (void)cudaFree(data_); }

  template <class T = void>
  T* at(size_t byte = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte);
  }
  size_t bytes() const { return bytes_; }

  /// The pattern over and over: one upload, then copies that double what is there.
  void fill(std::vector<char> const& pattern) {
    size_t have = pattern.size() < bytes_ ? pattern.size() : bytes_;
    check(cudaMemcpy(data_, pattern.data(), have, cudaMemcpyHostToDevice), "upload");
    for (; have < bytes_; have *= 2) {
      size_t const more = have < bytes_ - have ? have : bytes_ - have;
      check(cudaMemcpy(at(have), data_, more, cudaMemcpyDeviceToDevice), "copy");
    }
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

/// What `record` puts on a stream, `count` times with i = 0, 1, ..., captured once.
class Graph {
 public:
  template <class F>
  Graph(cudaStream_t stream, int count, F record) : stream_(stream), count_(count) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    for (int i = 0; i < count; ++i) record(i);
    cudaGraph_t graph;
    check(cudaStreamEndCapture(stream, &graph), "end of capture");
    check(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaEventCreate(&begin_), "cudaEventCreate"), check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  Graph(Graph const&) = delete;
  ~Graph() { (void)cudaGraphExecDestroy(graph_), (void)cudaEventDestroy(begin_), (void)cudaEventDestroy(end_); }

  /// Seconds of one of the `count`, between events on the device.
  double seconds() {
    check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    check(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e-3 / count_;
  }

 private:
  cudaStream_t stream_;
  int count_;
  cudaGraphExec_t graph_;
  cudaEvent_t begin_, end_;
};

}  // namespace bench
