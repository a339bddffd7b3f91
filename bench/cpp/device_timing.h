// Device memory, CUDA graphs and events for the microbenchmarks.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cctype>
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
    check(cudaStreamEndCapture(stream, &nodes_), "end of capture");
    instantiate();
  }
  Graph(Graph const&) = delete;
  ~Graph() {
    (void)cudaGraphExecDestroy(graph_), (void)cudaGraphDestroy(nodes_);
    (void)cudaEventDestroy(begin_), (void)cudaEventDestroy(end_);
  }

  int count() const { return count_; }

  /// The kernels in it, each once: `chunk_fwd_scan` for chunk_fwd_scan_kernel<...>.
  std::vector<std::string> kernels() const {
    std::vector<std::string> names;
    for (cudaGraphNode_t node : kernel_nodes())
      if (std::string const name = kernel_name(node); std::find(names.begin(), names.end(), name) == names.end())
        names.push_back(name);
    return names;
  }
  /// The launches of that kernel alone, one after another, on whatever the memory holds.
  Graph only(std::string const& kernel) const { return Graph(*this, kernel); }

  /// Seconds of one of the `count`, between events on the device.
  double seconds() const {
    check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    check(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e-3 / count_;
  }

 private:
  Graph(Graph const& all, std::string const& kernel) : stream_(all.stream_), count_(all.count_) {
    check(cudaGraphCreate(&nodes_, 0), "cudaGraphCreate");
    cudaGraphNode_t before = nullptr;
    for (cudaGraphNode_t node : all.kernel_nodes()) {
      if (kernel_name(node) != kernel) continue;
      cudaKernelNodeParams const launch = launch_of(node);
      cudaGraphNode_t copy;
      check(cudaGraphAddKernelNode(&copy, nodes_, &before, before ? 1 : 0, &launch), "cudaGraphAddKernelNode");
      check(cudaGraphKernelNodeCopyAttributes(copy, node), "cudaGraphKernelNodeCopyAttributes");
      before = copy;
    }
    instantiate();
  }

  void instantiate() {
    check(cudaGraphInstantiate(&graph_, nodes_, 0), "cudaGraphInstantiate");
    check(cudaEventCreate(&begin_), "cudaEventCreate"), check(cudaEventCreate(&end_), "cudaEventCreate");
  }

  /// In the order of their capture.
  std::vector<cudaGraphNode_t> kernel_nodes() const {
    size_t count = 0;
    check(cudaGraphGetNodes(nodes_, nullptr, &count), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> all(count), kernels;
    check(cudaGraphGetNodes(nodes_, all.data(), &count), "cudaGraphGetNodes");
    for (cudaGraphNode_t node : all) {
      cudaGraphNodeType type;
      check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
      if (type == cudaGraphNodeTypeKernel) kernels.push_back(node);
    }
    return kernels;
  }

  static cudaKernelNodeParams launch_of(cudaGraphNode_t node) {
    cudaKernelNodeParams launch;
    check(cudaGraphKernelNodeGetParams(node, &launch), "cudaGraphKernelNodeGetParams");
    return launch;
  }

  static std::string kernel_name(cudaGraphNode_t node) {
    char const* mangled = nullptr;
    check(cudaFuncGetName(&mangled, launch_of(node).func), "cudaFuncGetName");
    std::string const name = mangled;
    size_t const end = std::min(name.find("_kernel"), name.size());
    size_t begin = end;
    while (begin > 0 && (std::islower(static_cast<unsigned char>(name[begin - 1])) || name[begin - 1] == '_')) --begin;
    return name.substr(begin, end - begin);
  }

  cudaStream_t stream_;
  int count_;
  cudaGraph_t nodes_;
  cudaGraphExec_t graph_;
  cudaEvent_t begin_, end_;
};

}  // namespace bench
