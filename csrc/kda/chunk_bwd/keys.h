// Gradients of q, k and the gate, of one chunk of one value head. With the decays e around an anchor, and results that
// gather everything that meets at the anchor (keys_anchored.h; keys_split.h for steep gates):
//
//     dq_r = e_r D^q_r + diag k_r           dk_r = e_r D^k_r + D^c_r / e_r + diag q_r
//     D^q: scale dO S_0^T, dA_qk k          D^k: -dX S_0^T, dA_kk k          D^c: U dS_C^T, dA_qk^T q, dA_kk^T k
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
    for (int i = 0; i < Base::kTiles; ++i) this->bringer(i).init();
    this->sync_team();
    this->load_gate_parameters(chunk.value_head);
    this->load_inputs(chunk);
    bool const wide = this->gate_is_wide();
    if (wide) this->load_wide_gate(chunk);
    else this->load_cell();
    if (thread < Base::kChunk) s.diagonal[thread] = cell.sums().diagonal[thread];
    if (wide || cell.tiles < Base::kTiles) cp_async_wait<0>();
    else cp_async_wait<Base::kTiles>();
    this->sync_team();
    this->load_gate(chunk);
    if (wide) this->bringer(0).release();
    this->normalise();
    this->keep_inputs();
    if (wide) this->load_cell();
    if (this->any_steep()) SplitGradients<Variant>{*this}.run();
    else AnchoredGradients<Variant>{*this}.run();
    add_diagonal();
    through_norms();
    store_keys();
    through_gate();
  }

 private:
  KDA_DEVICE void add_diagonal() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const d = Base::both(s.diagonal[this->row(j)]);
      dq[j] = dq[j] + d * this->k(j, this->raw_k[j]);
      dk[j] = dk[j] + d * this->q(j, this->raw_q[j]);
    }
  }

  /// y = x / |x|: dx = (dy - y <y, dy>) / |x|.
  KDA_DEVICE void through_norms() {
    float dots[2][kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const q = this->q(j, this->raw_q[j]) * dq[j], k = this->k(j, this->raw_k[j]) * dk[j];
      dots[0][j] = q.x + q.y, dots[1][j] = k.x + k.y;
    }
    if (!p.l2norm) return;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      float const sum = warp_sum_scattered(dots[kind]);
      if (lane < kTokensPerThread) s.dots[kind][warp % kPerGroup][this->row(lane)] = sum;
    }
    this->sync_team();
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      dq[j] = through_norm(0, j, this->q(j, this->raw_q[j]), dq[j]);
      dk[j] = through_norm(1, j, this->k(j, this->raw_k[j]), dk[j]);
    }
  }
  KDA_DEVICE float2 through_norm(int kind, int j, float2 y, float2 dy) const {
    int const row = this->row(j);
    float dot = 0.f;
#pragma unroll
    for (auto const& part : s.dots[kind]) dot += part[row];
    return (dy + y * Base::both(-dot)) * Base::both(s.norm[kind * Base::kChunk + row]);
  }

  /// dq and dk leave through shared memory, in pieces of 16 bytes; of grouped heads as fp32, to be summed later.
  KDA_DEVICE void store_keys() {
    bool const grouped = call.dq_sum || call.dk_sum;
    if (grouped) store_keys_from<float>(s.results[0], s.results[1], chunk.value_head);
    else store_keys_from<E>(s.blocks.q, s.blocks.k, chunk.head);
  }
  template <class T, class Tile>
  KDA_DEVICE void store_keys_from(Tile& of_q, Tile& of_k, int head) {
    put<T>(of_q, dq), put<T>(of_k, dk);
    this->sync_team();
    if (call.dq.data) store<T>(call.dq, of_q, head);
    if (call.dk.data) store<T>(call.dk, of_k, head);
  }

  /// dg, and what this chunk adds to dA_log and ddt_bias. The gate as given comes from global memory once more.
  KDA_DEVICE void through_gate() {
    bool const raw = p.gate.kind != GateKind::kLogDecay;
    this->sync_team();
    if (raw) {
      float2 x[kTokensPerThread];
      if (p.g.is_fp32) load_gate_again<float>(s.template gate<float>(), x);
      else load_gate_again<E>(s.template gate<E>(), x);
      sum_over_tokens(differentiate_gate(x));
    }
    if (!call.dg.data) return;
    if (p.g.is_fp32) store_gate<float>(s.template gate<float>());
    else store_gate<E>(s.template gate<E>());
  }
  template <class T, class Tile>
  KDA_DEVICE void load_gate_again(Tile& tile, float2 (&x)[kTokensPerThread]) {
    tile_rows<T>(p.g, chunk, chunk.value_head, 0, p.key_dim).template load<Base::kKeyTile>(tile, 0, thread, kThreads);
    cp_async_commit();
    cp_async_wait<0>();
    this->sync_team();
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      x[j] = tile::to_float2<T>(tile::load_pair<T>(&tile.at(this->row(j), 2 * pair)));
  }
  template <class T, class Tile>
  KDA_DEVICE void store_gate(Tile& tile) {
    put<T>(tile, dg);
    this->sync_team();
    store<T>(call.dg, tile, chunk.value_head);
  }
  /// dg of what the gate is made of. Sums over the thread's tokens: for the two channels, and of both for dA_log.
  KDA_DEVICE float3 differentiate_gate(float2 (&x)[kTokensPerThread]) {
    float3 sums{0.f, 0.f, 0.f};
    ChannelGate const gates[2] = {{p.gate, s.gate_amplitude, s.gate_bias[2 * pair]},
                                  {p.gate, s.gate_amplitude, s.gate_bias[2 * pair + 1]}};
    float2 of_amplitude[kTokensPerThread];
    gate_derivatives<E>(x, of_amplitude, gates[0], gates[1]);
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const d = this->row(j) < chunk.rows ? dg[j] : float2{0.f, 0.f};
      sums.z += d.x * of_amplitude[j].x + d.y * of_amplitude[j].y;
      dg[j] = d * x[j];
      sums.x += dg[j].x, sums.y += dg[j].y;
    }
    return sums;
  }
  KDA_DEVICE void sum_over_tokens(float3 sums) {
    s.group_sum[group][pair] = {sums.x, sums.y};
    float const amplitude = warp_sum(sums.z);
    if (lane == 0) s.d_amplitude[warp] = amplitude;
    this->sync_team();
    if (group == 0) *reinterpret_cast<float2*>(&cell.sums().ddt_bias[2 * pair]) = this->sum_of_groups(0, kGroups);
    if (thread) return;
    float sum = 0.f;
    for (float x : s.d_amplitude) sum += x;
    cell.sums().dA_log = sum;
  }

  template <class T, class Tile>
  KDA_DEVICE void put(Tile& tile, float2 const (&x)[kTokensPerThread]) const {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      tile::store_pair<T>(&tile.at(this->row(j), 2 * pair), tile::to_pair<T>(x[j].x, x[j].y));
  }
  template <class T, class Tile>
  KDA_DEVICE void store(Rows const& to, Tile const& tile, int head) const {
    tile_rows<T>(to, chunk, head, 0, p.key_dim).template store<Base::kKeyTile>(tile, 0, thread, kThreads);
  }
};

}  // namespace kda
