// The gate, elementwise, and the sums over all tokens that its parameters' gradients are.
#pragma once
#include "kda/elements.h"
#include "kda/kda_gate/params.h"
#include "platform/platform.h"

namespace kda {

KDA_DEVICE int64_t gate_offset(GateTensor const& t, KdaGateParams const& p, int64_t row, int head, int channel) {
  return row / p.rows1 * t.stride[0] + row % p.rows1 * t.stride[1] + head * t.stride[2] + channel * t.stride[3];
}
/// y = log_decay(g). Blocks: (run of rows, value head); a thread keeps one channel and walks the rows of its run.
template <class E>
KDA_GLOBAL void __launch_bounds__(kGateThreads) kda_gate_fwd_kernel(KdaGateParams const p) {
  int64_t const rows = p.rows0 * p.rows1, first = rows * blockIdx.x / gridDim.x,
                end = rows * (blockIdx.x + 1) / gridDim.x;
  int const head = int(blockIdx.y);
  int const lanes = p.key_dim < kGateThreads ? kGateThreads / p.key_dim * p.key_dim : kGateThreads;
  int const rows_at_once = lanes > p.key_dim ? lanes / p.key_dim : 1;
  if (thread_index() >= lanes) return;
  for (int channel = thread_index() % p.key_dim; channel < p.key_dim; channel += lanes) {
    ChannelGate const gate(p.gate, head, channel, p.key_dim);
    for (int64_t row = first + thread_index() / p.key_dim; row < end; row += rows_at_once) {
      float const x = to_float(static_cast<E const*>(p.g.data)[gate_offset(p.g, p, row, head, channel)]);
      store_float(p.y.data, p.y.dtype, gate_offset(p.y, p, row, head, channel), gate.log_decay(x));
    }
  }
}

/// dg, and per run of rows the sums that become dA_log and ddt_bias.
template <class E>
KDA_GLOBAL void __launch_bounds__(kGateThreads) kda_gate_bwd_kernel(KdaGateParams const p) {
  int64_t const rows = p.rows0 * p.rows1, first = rows * blockIdx.x / gridDim.x,
                end = rows * (blockIdx.x + 1) / gridDim.x;
  int const head = int(blockIdx.y);
  for (int channel = thread_index(); channel < p.key_dim; channel += kGateThreads) {
    ChannelGate const gate(p.gate, head, channel, p.key_dim);
    float sum_bias = 0.f, sum_amplitude = 0.f;
    for (int64_t row = first; row < end; ++row) {
      float const x = to_float(static_cast<E const*>(p.g.data)[gate_offset(p.g, p, row, head, channel)]);
      float const dy = load_float(p.y.data, p.y.dtype, gate_offset(p.y, p, row, head, channel));
      // What nobody asks for has no gradient, whatever it holds: padding may be NaN.
      float2 const slope = gate.derivatives(dy == 0.f ? 0.f : x);
      store_float(p.dg.data, p.dg.dtype, gate_offset(p.dg, p, row, head, channel), dy * slope.x);
      sum_bias += dy * slope.x;
      sum_amplitude += dy * slope.y;
    }
    int64_t const at = (int64_t(blockIdx.x) * p.value_heads + head) * p.key_dim + channel;
    p.partial[at] = sum_bias;
    p.partial[at + int64_t(p.row_blocks) * p.value_heads * p.key_dim] = sum_amplitude;
  }
}

struct GateReduceStorage {
  float amplitude[kGateThreads];  // each thread's channels
};

/// Adds the runs in order. One block per value head.
static KDA_GLOBAL void __launch_bounds__(kGateThreads) kda_gate_reduce_kernel(KdaGateParams const p) {
  KDA_SHARED(GateReduceStorage, storage);
  int const head = int(blockIdx.x);
  int64_t const run = int64_t(p.value_heads) * p.key_dim;
  float amplitude = 0.f;
  for (int channel = thread_index(); channel < p.key_dim; channel += kGateThreads) {
    float bias = 0.f;
    for (int i = 0; i < p.row_blocks; ++i) {
      int64_t const at = i * run + int64_t(head) * p.key_dim + channel;
      bias += p.partial[at];
      amplitude += p.partial[at + p.row_blocks * run];
    }
    if (p.ddt_bias) p.ddt_bias[int64_t(head) * p.key_dim + channel] = bias;
  }
  storage.amplitude[thread_index()] = amplitude;
  sync_block();
  if (thread_index() == 0 && p.dA_log) {
    float sum = 0.f;
    for (int i = 0; i < kGateThreads; ++i) sum += storage.amplitude[i];
    p.dA_log[head] = sum;
  }
}

}  // namespace kda
