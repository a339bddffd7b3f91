// Gradients of q, k and the gate, of one chunk of one value head. With q' = scale q, e the decays around an anchor, and
// results that gather everything that meets at the anchor (keys_anchored.h; keys_split.h for steep gates):
//
//     dq'_r = e_r D^q_r + diag k_r          dk_r = e_r D^k_r + D^c_r / e_r + diag q'_r
//     D^q: dO S_0^T, dA_qk k                D^k: -dX S_0^T, dA_kk k          D^c: U dS_C^T, dA_qk^T q', dA_kk^T k
//
// The gate of token t gets what flows through t: from rows r >= t what began before t, and so on. Diagonals have no
// decay. Then the chain rule through l2norm and the gate.
#pragma once
#include "kda/chunk_bwd/keys_anchored.h"
#include "kda/chunk_bwd/keys_split.h"

namespace kda {

template <class Variant>
struct KeyGradients : KeysThread<Variant> {
  using Base = KeysThread<Variant>;
  using Base::call, Base::cell, Base::chunk, Base::columns, Base::dg, Base::dk, Base::dq, Base::group, Base::kGroups,
      Base::kThreads, Base::kWarps, Base::lane, Base::p, Base::pair, Base::s, Base::thread, Base::warp;
  using typename Base::E;
  static constexpr int kPerGroup = Base::Shape::kWarpsPerGroup;

  KDA_DEVICE void run() {
    this->load_gate_parameters(chunk.value_head);
    this->load_inputs(chunk);
    if (this->gate_is_wide()) this->load_wide_gate(chunk);
    if (thread < Base::kChunk) s.diagonal[thread] = cell.sums().diagonal[thread];
    cp_async_wait<0>();
    this->sync_team();
    this->load_gate(chunk);
    this->normalise();
    this->keep_inputs();
    if (this->any_steep()) SplitGradients<Variant>{*this}.run();
    else AnchoredGradients<Variant>{*this}.run();
    add_diagonal();
    through_norms();
    through_gate();
  }

 private:
  KDA_DEVICE void add_diagonal() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const d = Base::both(s.diagonal[this->row(j)]);
      dq[j] = dq[j] + d * this->k(j, this->raw_k[j]);
      dk[j] = dk[j] + d * this->scaled_q(j);
    }
  }

  /// y = x / |x|: dx = (dy - y <y, dy>) / |x|.
  KDA_DEVICE void through_norms() {
    float dots[2][kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      dq[j] = dq[j] * Base::both(p.scale);
      float2 const q = this->q(j, this->raw_q[j]) * dq[j], k = this->k(j, this->raw_k[j]) * dk[j];
      dots[0][j] = q.x + q.y, dots[1][j] = k.x + k.y;
    }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      float const sum = warp_sum_scattered(dots[kind]);
      if (lane < kTokensPerThread) s.dots[kind][warp % kPerGroup][this->row(lane)] = sum;
    }
    this->sync_team();
    int const of_keys = call.dq_sum || call.dk_sum ? chunk.value_head : chunk.head;  // grouped heads are summed later
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      int const row = this->row(j);
      if (row >= chunk.rows) continue;
      if (call.dq.data) store(call.dq, of_keys, row, through_norm(0, j, dq[j]));
      if (call.dk.data) store(call.dk, of_keys, row, through_norm(1, j, dk[j]));
    }
  }
  KDA_DEVICE float2 through_norm(int kind, int j, float2 dy) const {
    if (!p.l2norm) return dy;
    int const row = this->row(j);
    float dot = 0.f;
#pragma unroll
    for (auto const& part : s.dots[kind]) dot += part[row];
    float2 const y = kind ? this->k(j, this->raw_k[j]) : this->q(j, this->raw_q[j]);
    return (dy + y * Base::both(-dot)) * Base::both(s.norm[kind * Base::kChunk + row]);
  }

  /// dg, and what this chunk adds to dA_log and ddt_bias.
  KDA_DEVICE void through_gate() {
    float2 bias{0.f, 0.f};
    float amplitude = 0.f;
    bool const raw = p.gate.kind != GateKind::kLogDecay;
    ChannelGate const gates[2] = {{p.gate, s.gate_amplitude, s.gate_bias[2 * pair]},
                                  {p.gate, s.gate_amplitude, s.gate_bias[2 * pair + 1]}};
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      int const row = this->row(j);
      if (row >= chunk.rows) continue;
      if (raw) {
        float2 const x = load(p.g, chunk.value_head, row);
        float2 const first = gates[0].template derivatives_for<E>(x.x),
                     second = gates[1].template derivatives_for<E>(x.y);
        amplitude += dg[j].x * first.y + dg[j].y * second.y;
        dg[j] = dg[j] * float2{first.x, second.x};
        bias = bias + dg[j];
      }
      if (call.dg.data) store(call.dg, chunk.value_head, row, dg[j]);
    }
    if (raw) sum_over_tokens(bias, amplitude);
  }
  KDA_DEVICE void sum_over_tokens(float2 bias, float amplitude) {
    this->sync_team();  // the last sums over groups have been read
    s.group_sum[group][pair] = bias;
    amplitude = warp_sum(amplitude);
    if (lane == 0) s.d_amplitude[warp] = amplitude;
    this->sync_team();
    if (group == 0) {
#pragma unroll
      for (int i = 1; i < kGroups; ++i) bias = bias + s.group_sum[i][pair];
      *reinterpret_cast<float2*>(&cell.sums().ddt_bias[2 * pair]) = bias;
    }
    if (thread) return;
    float sum = 0.f;
    for (float x : s.d_amplitude) sum += x;
    cell.sums().dA_log = sum;
  }

  KDA_DEVICE int64_t offset(Rows const& x, int head, int row) const {
    return chunk.batch_row * x.strides.batch + (chunk.begin + row) * x.strides.token + head * x.strides.head + 2 * pair;
  }
  KDA_DEVICE void store(Rows const& to, int head, int row, float2 x) const {
    if (to.is_fp32) store_as<float>(to, head, row, x);
    else store_as<E>(to, head, row, x);
  }
  template <class T>
  KDA_DEVICE void store_as(Rows const& to, int head, int row, float2 x) const {
    T* const at = static_cast<T*>(to.data) + offset(to, head, row);
    if (to.in_pieces) {
      if (2 * pair < p.key_dim) tile::store_pair<T>(at, tile::to_pair<T>(x.x, x.y));
      return;
    }
    if (2 * pair < p.key_dim) at[0] = from_float<T>(x.x);
    if (2 * pair + 1 < p.key_dim) at[1] = from_float<T>(x.y);
  }
  KDA_DEVICE float2 load(Rows const& from, int head, int row) const {
    return from.is_fp32 ? load_as<float>(from, head, row) : load_as<E>(from, head, row);
  }
  template <class T>
  KDA_DEVICE float2 load_as(Rows const& from, int head, int row) const {
    T const* const at = static_cast<T const*>(from.data) + offset(from, head, row);
    if (from.in_pieces && 2 * pair < p.key_dim) return tile::to_float2<T>(tile::load_pair<T>(at));
    return {2 * pair < p.key_dim ? to_float(at[0]) : 0.f, 2 * pair + 1 < p.key_dim ? to_float(at[1]) : 0.f};
  }
};

}  // namespace kda
