// What every microbenchmark's main does, and the device, asked once.
#pragma once
#include <benchmark/benchmark.h>

#include <algorithm>
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

/// How many sets of so many bytes rotate through more memory than the L2 holds. Throws where they, and a copy of the
/// same bytes, do not fit.
inline size_t sets_of(size_t bytes, size_t most) {
  cudaDeviceProp const& gpu = Device::get().properties;
  size_t const sets = std::clamp<size_t>(4 * size_t(gpu.l2CacheSize) / bytes + 1, 2, most);
  if (2 * sets * bytes > gpu.totalGlobalMem / 2) throw std::runtime_error("does not fit in half of the memory");
  return sets;
}

inline double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
  return x[x.size() / 2];
}

/// Times one of the graph's calls, by turns with a copy of as many bytes, so that both see the same clocks. Returns the
/// median in microseconds, which is among the counters.
inline double time_beside_copies(benchmark::State& run, Graph const& calls, size_t bytes) {
  cudaStream_t const stream = Device::get().stream;
  size_t const sets = size_t(calls.count()), half = bytes / 2;  // a copy reads as much as it writes
  DeviceBuffer const source(sets * half), target(sets * half);
  Graph const copies(stream, calls.count(), [&](int i) {
    check(cudaMemcpyAsync(target.at(i * half), source.at(i * half), half, cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  });
  calls.seconds(), copies.seconds();
  std::vector<double> call_us, copy_us;
  for (auto _ : run) {
    double const seconds = calls.seconds();
    run.SetIterationTime(seconds);
    call_us.push_back(1e6 * seconds), copy_us.push_back(1e6 * copies.seconds());
  }
  double const us = median(call_us);
  run.counters["us"] = us, run.counters["copy_us"] = median(copy_us), run.counters["bytes"] = double(bytes);
  run.counters["percent_of_copy"] = 100 * median(copy_us) / us;
  return us;
}

/// Registers `measure(state, config)`; what it throws is the result of that configuration.
template <class Config>
void add(std::string const& name, Config const& config, void (*measure)(benchmark::State&, Config const&)) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& run) {
                                 try {
                                   measure(run, config);
                                 } catch (std::exception const& e) {
                                   run.SkipWithError(e.what());
                                 }
                               })
      ->UseManualTime()
      ->Iterations(20)
      ->Unit(benchmark::kMicrosecond);
}

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
