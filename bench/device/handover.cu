// One half of a block fills buffers, the other half reads them, by named barriers alone, with the primitives of the
// scans. The control of run.sh, sanitize: racecheck reports hazards in some of these kernels, where there are none.
//
//     filler                    reader
//     sync_named   empty(b)     sync_named   full(b)     every thread of the block takes part in each barrier:
//     writes       buffer b     reads        buffer b    one half arrives, the other half waits. A buffer is written
//     arrive_named full(b)      arrive_named empty(b)    after it was read, and read after it was written.
#include <cstdio>

#include "platform/platform.h"

namespace kda {
namespace {

constexpr int kHalf = 64, kThreads = 2 * kHalf, kTurns = 12;

template <int kBuffers>
struct Buffers {
  float4 x[kBuffers][kHalf];

  static KDA_DEVICE int full(int buffer) { return 1 + buffer; }
  static KDA_DEVICE int empty(int buffer) { return 1 + kBuffers + buffer; }
};

template <int kBuffers>
KDA_GLOBAL void handover_kernel(float4 const* in, float* sums) {
  KDA_SHARED(Buffers<kBuffers>, shared);
  int const lane = thread_index() % kHalf;
  if (thread_index() < kHalf) {
    for (int turn = 0; turn < kTurns; ++turn) {
      int const b = turn % kBuffers;
      if (turn >= kBuffers) sync_named(shared.empty(b), kThreads);
      shared.x[b][lane] = in[turn * kHalf + lane];
      arrive_named(shared.full(b), kThreads);
    }
  } else {
    float sum = 0.f;
    for (int turn = 0; turn < kTurns; ++turn) {
      int const b = turn % kBuffers;
      sync_named(shared.full(b), kThreads);
      float4 const x = shared.x[b][kHalf - 1 - lane];
      sum += x.x + x.y + x.z + x.w;
      if (turn + kBuffers < kTurns) arrive_named(shared.empty(b), kThreads);
    }
    sums[lane] = sum;
  }
}

template <int kBuffers>
int wrong_sums(float4 const* in, float* on_device) {
  float sums[kHalf];
  handover_kernel<kBuffers><<<1, kThreads>>>(in, on_device);
  cudaError_t const error = cudaMemcpy(sums, on_device, sizeof(sums), cudaMemcpyDeviceToHost);
  if (error) return std::puts(cudaGetErrorString(error)), 1;
  int wrong = 0;
  for (int lane = 0; lane < kHalf; ++lane)  // of 4 x (turn * kHalf + kHalf - 1 - lane)
    wrong += sums[lane] != 4.f * (kHalf * kTurns * (kTurns - 1) / 2 + kTurns * (kHalf - 1 - lane));
  std::printf("%d buffers: %d wrong sums\n", kBuffers, wrong);
  return wrong;
}

int run() {
  float4 host[kTurns * kHalf], *in;
  float* sums;
  for (int i = 0; i < kTurns * kHalf; ++i) host[i] = {float(i), float(i), float(i), float(i)};
  if (cudaMalloc(&in, sizeof(host)) || cudaMalloc(&sums, kHalf * sizeof(float))) return std::puts("no memory"), 1;
  if (cudaMemcpy(in, host, sizeof(host), cudaMemcpyHostToDevice)) return std::puts("no copy"), 1;
  return wrong_sums<1>(in, sums) + wrong_sums<2>(in, sums) + wrong_sums<3>(in, sums) != 0;
}

}  // namespace
}  // namespace kda

int main() { return kda::run(); }
