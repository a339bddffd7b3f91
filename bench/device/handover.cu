// One half of a block fills buffers, the other half reads them, by named barriers alone: the textbook use of
// bar.arrive. The control of run.sh, sanitize: racecheck reports hazards in some of these kernels, where there are
// none.
//
//     filler                    reader
//     bar.sync   empty(b)       bar.sync   full(b)     every thread of the block takes part in each barrier:
//     writes     buffer b       reads      buffer b    one half arrives, the other half waits. A buffer is written
//     bar.arrive full(b)        bar.arrive empty(b)    after it was read, and read after it was written.
#include <cstdio>

constexpr int kHalf = 64, kTurns = 12;

__device__ void wait(int barrier) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(2 * kHalf) : "memory"); }
__device__ void arrive(int barrier) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(2 * kHalf) : "memory"); }

template <int kBuffers>
__global__ void handover_kernel(float4 const* in, float* sums) {
  __shared__ float4 buffers[kBuffers][kHalf];
  int const lane = threadIdx.x % kHalf;
  auto const full = [](int buffer) { return 1 + buffer; };
  auto const empty = [](int buffer) { return 1 + kBuffers + buffer; };
  if (threadIdx.x < kHalf) {
    for (int turn = 0; turn < kTurns; ++turn) {
      int const b = turn % kBuffers;
      if (turn >= kBuffers) wait(empty(b));
      buffers[b][lane] = in[turn * kHalf + lane];
      arrive(full(b));
    }
  } else {
    float sum = 0.f;
    for (int turn = 0; turn < kTurns; ++turn) {
      int const b = turn % kBuffers;
      wait(full(b));
      float4 const x = buffers[b][kHalf - 1 - lane];
      sum += x.x + x.y + x.z + x.w;
      if (turn + kBuffers < kTurns) arrive(empty(b));
    }
    sums[lane] = sum;
  }
}

template <int kBuffers>
int wrong_sums(float4 const* in, float* on_device) {
  float sums[kHalf];
  handover_kernel<kBuffers><<<1, 2 * kHalf>>>(in, on_device);
  cudaError_t const error = cudaMemcpy(sums, on_device, sizeof(sums), cudaMemcpyDeviceToHost);
  if (error) return std::puts(cudaGetErrorString(error)), 1;
  int wrong = 0;
  for (int lane = 0; lane < kHalf; ++lane)  // of 4 x (turn * kHalf + kHalf - 1 - lane)
    wrong += sums[lane] != 4.f * (kHalf * kTurns * (kTurns - 1) / 2 + kTurns * (kHalf - 1 - lane));
  std::printf("%d buffers: %d wrong sums\n", kBuffers, wrong);
  return wrong;
}

int main() {
  float4 host[kTurns * kHalf], *in;
  float* sums;
  for (int i = 0; i < kTurns * kHalf; ++i) host[i] = {float(i), float(i), float(i), float(i)};
  if (cudaMalloc(&in, sizeof(host)) || cudaMalloc(&sums, kHalf * sizeof(float))) return std::puts("no memory"), 1;
  if (cudaMemcpy(in, host, sizeof(host), cudaMemcpyHostToDevice)) return std::puts("no copy"), 1;
  return wrong_sums<1>(in, sums) + wrong_sums<2>(in, sums) + wrong_sums<3>(in, sums) != 0;
}
