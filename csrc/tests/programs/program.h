// Small kernels, one for each primitive of csrc/platform. The same source runs on the emulator and on a GPU; each
// program's output is compared with its plain definition (test_primitives.cpp) and, bit by bit, between the two
// (python_tests/house/test_primitives.py).
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "platform/launch.h"
#include "platform/platform.h"

namespace kda::tests {

/// Memory of the device.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> const& host) : size_(host.size()) {
#if defined(KDA_EMULATE)
    void* memory = nullptr;  // not a byte more, so that AddressSanitizer sees the end
    if (posix_memalign(&memory, 1024, bytes() ? bytes() : 1)) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
    if (bytes()) std::memcpy(static_cast<void*>(data_), host.data(), bytes());
#else
    check_cuda(cudaMalloc(&data_, bytes()), "cudaMalloc");
    check_cuda(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
#endif
  }
  Buffer(Buffer const&) = delete;
  Buffer& operator=(Buffer const&) = delete;
  ~Buffer() {
#if defined(KDA_EMULATE)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  T* data() const { return data_; }
  std::vector<T> download() const {
    std::vector<T> host(size_);
#if defined(KDA_EMULATE)
    if (bytes()) std::memcpy(static_cast<void*>(host.data()), data_, bytes());
#else
    check_cuda(cudaDeviceSynchronize(), "a kernel");
    check_cuda(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
#endif
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
  size_t bytes() const { return size_ * sizeof(T); }
};

/// Launches kernel(output, arguments...) and returns the output, `size` elements that were poisoned before.
template <class T, class... P, class... A>
std::vector<T> run(void (*kernel)(T*, P...), dim3 grid, dim3 block, size_t shared_bytes, size_t size, A const&... a) {
  std::vector<T> poison(size);
  std::memset(static_cast<void*>(poison.data()), 0xFF, size * sizeof(T));
  Buffer<T> output(poison);
  launch("program", kernel, grid, block, shared_bytes, nullptr, output.data(), a...);
  return output.download();
}

/// Reproducible numbers: `hash` of the index, small integers (exact in every format and every order of summation),
/// reals in [-1, 1).
inline uint32_t hash(uint32_t i, uint32_t seed = 0) {
  i = (i + seed * 0x9E3779B9u) * 0x85EBCA6Bu;
  i = (i ^ i >> 15) * 0xC2B2AE35u;
  return i ^ i >> 16;
}
inline float small_integer(uint32_t i, uint32_t seed) { return float(int(hash(i, seed) % 9) - 4); }
inline float real(uint32_t i, uint32_t seed) { return float(int32_t(hash(i, seed))) * 0x1p-31f; }
/// Reals over many powers of two, some of them zero: what tensor cores align and truncate.
inline float scattered(uint32_t i, uint32_t seed) {
  uint32_t const kind = hash(i, seed + 1000) % 24;
  return kind == 0 ? 0.f : real(i, seed) * float(1u << kind) * 0x1p-12f;
}

template <class E, bool kScattered>
std::vector<E> numbers(size_t n, uint32_t seed) {
  std::vector<E> x(n);
  for (size_t i = 0; i < n; ++i)
    x[i] = from_float<E>(kScattered ? scattered(uint32_t(i), seed) : small_integer(uint32_t(i), seed));
  return x;
}
template <class E>
std::vector<E> integers(size_t n, uint32_t seed) {
  return numbers<E, false>(n, seed);
}
inline std::vector<float> reals(size_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = real(uint32_t(i), seed);
  return x;
}
inline std::vector<uint32_t> words(size_t n, uint32_t seed) {
  std::vector<uint32_t> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = hash(uint32_t(i), seed);
  return x;
}

/// What the executables write to a file.
struct Program {
  std::string name;
  std::vector<char> (*run)();
  float tolerance;  // between the emulator and a GPU, relative to max(|value|, floor); 0: bit by bit
  float floor;
};

template <auto kRun>
std::vector<char> bytes_of() {
  auto const values = kRun();
  std::vector<char> bytes(values.size() * sizeof(values[0]));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

}  // namespace kda::tests
