// What every microbenchmark's main does, and the device, asked once.
#pragma once
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "bench/cpp/device_timing.h"

namespace bench {

struct Device {
  cudaDeviceProp properties;
  cudaStream_t stream;

  Device() {
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
  }
  static Device const& get() {
    static Device const device;
    return device;
  }
};

/// Runs what is registered; without a device it can only list it. Returns the exit status.
inline int run(char const* name, int argc, char** argv) try {
  bool listed = false;
  for (int i = 1; i < argc; ++i) listed |= std::strncmp(argv[i], "--benchmark_list_tests", 22) == 0;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  if (!listed) {
    cudaDeviceProp const& gpu = Device::get().properties;
    benchmark::AddCustomContext("gpu", gpu.name);
    benchmark::AddCustomContext("l2_bytes", std::to_string(gpu.l2CacheSize));
    char const* const commit = std::getenv("KDA_CUDA_COMMIT");
    benchmark::AddCustomContext("commit", commit ? commit : KDA_COMMIT);
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
} catch (std::exception const& e) {
  std::fprintf(stderr, "%s: %s\n", name, e.what());
  return 1;
}

}  // namespace bench
