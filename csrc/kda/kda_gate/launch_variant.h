// The launches for one element type of g; included by the files in variants/ alone.
#pragma once
#include "kda/kda_gate/kernel.h"
#include "platform/launch.h"

namespace kda {

template <class E>
void launch_kda_gate_fwd(KdaGateParams const& p, cudaStream_t stream) {
  int64_t const rows = p.rows0 * p.rows1, runs = (rows + 15) / 16;
  launch("kda_gate_fwd", kda_gate_fwd_kernel<E>, dim3(unsigned(runs < 4096 ? runs : 4096), unsigned(p.value_heads)),
         dim3(kGateThreads), 0, stream, p);
}

template <class E>
void launch_kda_gate_bwd(KdaGateParams const& p, cudaStream_t stream) {
  launch("kda_gate_bwd", kda_gate_bwd_kernel<E>, dim3(unsigned(p.row_blocks), unsigned(p.value_heads)),
         dim3(kGateThreads), 0, stream, p);
  launch("kda_gate_reduce", kda_gate_reduce_kernel, dim3(unsigned(p.value_heads)), dim3(kGateThreads), 0, stream, p);
}

}  // namespace kda
