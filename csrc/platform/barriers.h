// Barriers within a block, and between kernels of a stream.
#pragma once
#include "platform/macros.h"

namespace kda {

/// All threads of the block. PTX: barrier.sync 0
KDA_DEVICE void sync_block(KDA_WHERE_ONLY) {
#if defined(KDA_EMULATE)
  auto& engine = emulator::Engine::current();
  uint32_t const threads = engine.block.x * engine.block.y * engine.block.z;
  engine.named_barrier(0, (threads + 31) / 32 * 32, true, "sync_block", where);
#else
  __syncthreads();
#endif
}

/// `threads` threads (whole warps) meet at barrier `id` in 1..15. PTX: bar.sync
KDA_DEVICE void sync_named(int id, int threads KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().named_barrier(id, uint32_t(threads), true, "sync_named", where);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/// As sync_named, but does not wait. PTX: bar.arrive
KDA_DEVICE void arrive_named(int id, int threads KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().named_barrier(id, uint32_t(threads), false, "arrive_named", where);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/// The lanes of `mask`. PTX: bar.warp.sync
KDA_DEVICE void sync_warp(uint32_t mask = ~0u KDA_WHERE) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().sync_warp(mask, where);
#else
  __syncwarp(mask);
#endif
}

/// Until the kernel ahead of this one in the stream has ended, its writes visible; matters after launch_early. The
/// calling thread. PTX: griddepcontrol.wait, sm_90
KDA_DEVICE void wait_for_previous_kernel(KDA_WHERE_ONLY) {
#if defined(KDA_EMULATE)
  emulator::Engine::current().wait_for_previous_kernel(where);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// The kernel behind this one may start once every block has said so or ended, if it was launched early. One thread
/// says it for the block. PTX: griddepcontrol.launch_dependents, sm_90
KDA_DEVICE void let_next_kernel_start() {
#if defined(KDA_EMULATE)
  emulator::Engine::current().let_next_kernel_start();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace kda
