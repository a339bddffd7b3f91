// One half of a block fills buffers, the other half reads them, by named barriers alone: the textbook use of
// bar.arrive. The control of run.sh, sanitize: racecheck does not follow bar.arrive and reports hazards here, where
// there are none.
//
//     filler                    reader
//     bar.sync   empty(b)       bar.sync   full(b)     every thread of the block takes part in each barrier:
//     writes     buffer b       reads      buffer b    one half arrives, the other half waits. A buffer is written
//     bar.arrive full(b)        bar.arrive empty(b)    after it was read, and read after it was written.
#include <cstdio>

constexpr int kHalf = 64, kBuffers = 2, kTurns = 12;

__device__ void wait(int barrier) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(2 * kHalf) : "memory"); }
__device__ void arrive(int barrier) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(2 * kHalf) : "memory"); }
__device__ int full(int buffer) { return 1 + buffer; }
__device__ int empty(int buffer) { return 1 + kBuffers + buffer; }

__global__ void handover_kernel(int* sums) {
  __shared__ int buffers[kBuffers][kHalf];
  int const lane = threadIdx.x % kHalf;
  if (threadIdx.x < kHalf) {
    for (int turn = 0; turn < kTurns; ++turn) {
      int const b = turn % kBuffers;
      if (turn >= kBuffers) wait(empty(b));
      buffers[b][lane] = turn * kHalf + lane;
      arrive(full(b));
    }
  } else {
    int sum = 0;
    for (int turn = 0; turn < kTurns; ++turn) {
      int const b = turn % kBuffers;
      wait(full(b));
      sum += buffers[b][kHalf - 1 - lane];
      if (turn + kBuffers < kTurns) arrive(empty(b));
    }
    sums[lane] = sum;
  }
}

int main() {
  int *on_device, sums[kHalf], wrong = 0;
  if (cudaMalloc(&on_device, sizeof(sums))) return std::puts("no memory"), 1;
  handover_kernel<<<1, 2 * kHalf>>>(on_device);
  cudaError_t const error = cudaMemcpy(sums, on_device, sizeof(sums), cudaMemcpyDeviceToHost);
  if (error) return std::puts(cudaGetErrorString(error)), 1;
  for (int lane = 0; lane < kHalf; ++lane)
    wrong += sums[lane] != kHalf * kTurns * (kTurns - 1) / 2 + kTurns * (kHalf - 1 - lane);
  std::printf("%d wrong sums\n", wrong);
  return wrong != 0;
}
