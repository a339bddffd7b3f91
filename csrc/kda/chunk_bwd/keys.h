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
  static constexpr int kPerGroup = Base::Shape::kWarpsPerGroup, kSlices = Base::kSlices;

  KDA_DEVICE void run() {
    this->bringer().init();
    this->sync_team();
    this->load_gate_parameters(chunk.value_head);
    this->load_inputs(chunk);
    bool const wide = this->gate_is_wide(), steep = cell.inverse().flags.steep;
    if (wide) this->load_wide_gate(chunk);
    else this->load_cell();
    if (thread < Base::kChunk) s.diagonal[thread] = cell.sums().diagonal[thread];
    for (int i = thread; i < 2 * Base::kChunk; i += kThreads) s.norm[i] = cell.inverse().norm[i];
    if (wide) cp_async_wait<0>();
    else cp_async_wait<1>();
    this->sync_team();
    this->load_gate(chunk);
    if (wide) this->bringer().release();
    this->keep_inputs();
    this->sync_team();
    if (wide) this->load_cell();
    AnchoredGradients<Variant> anchored{*this};
    if (!steep) anchored.write();
    this->multiply_states();
    if (steep) split_gradients();
    else anchored.gather();
    add_diagonal();
    if (p.l2norm) sum_dots();
    if (p.gate.kind != GateKind::kLogDecay) through_gate();
    this->sync_team();
    if (p.l2norm && kSlices > 1) add_dots_of_other_slices();
    if (p.l2norm) through_norms();
    if (p.gate.kind != GateKind::kLogDecay) sum_over_tokens();
    store();
  }

 private:
  /// On a copy, so that this thread's own numbers stay in registers.
  KDA_DEVICE void split_gradients() {
    KeysThread<Variant> copy = *this;
    add_split_gradients(copy);
    this->take_gradients(copy);
  }

  KDA_DEVICE void add_diagonal() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const d = Base::both(s.diagonal[this->row(j)]);
      dq[j] = dq[j] + d * this->k(j, this->raw_k[j]);
      dk[j] = dk[j] + d * this->q(j, this->raw_q[j]);
    }
  }

  /// y = x / |x|: dx = (dy - y <y, dy>) / |x|.
  KDA_DEVICE void sum_dots() {
    float dots[2][kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const q = this->q(j, this->raw_q[j]) * dq[j], k = this->k(j, this->raw_k[j]) * dk[j];
      dots[0][j] = q.x + q.y, dots[1][j] = k.x + k.y;
    }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      float const sum = warp_sum_scattered(dots[kind]);
      if (lane >= kTokensPerThread) continue;
      s.dots[kind][warp % kPerGroup][this->row(lane)] = sum;
      if (kSlices > 1) publish(&cell.sums().dots[slice()][kind * Base::kChunk + this->row(lane)], sum);
    }
  }
  /// Those of the other channels, of this warp's tokens, from the same warp of the other blocks.
  KDA_DEVICE void add_dots_of_other_slices() {
    static_assert(kSlices == 1 || kPerGroup == 1);
    int const kind = lane / kTokensPerThread, row = this->row(lane % kTokensPerThread);
    for (int i = 0; i < kSlices; ++i)
      if (i != slice() && kind < 2)
        s.dots[kind][0][row] += await_published(&cell.sums().dots[i][kind * Base::kChunk + row]);
    sync_warp();
  }
  KDA_DEVICE int slice() const { return this->first_channel / Base::kKeyTile; }
  KDA_DEVICE void through_norms() {
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
    for (auto const& partial : s.dots[kind]) dot += partial[row];
    return (dy + y * Base::both(-dot)) * Base::both(s.norm[kind * Base::kChunk + row]);
  }

  /// dg of what the gate is made of; and its sums over the thread's tokens, of each channel, and of all for dA_log.
  KDA_DEVICE void through_gate() {
    float2 x[kTokensPerThread], of_amplitude[kTokensPerThread], sum{0.f, 0.f};
    if (this->gate_is_wide()) load_gate_again<float>();
    else if (!Base::Storage::kKeepsGate) load_gate_again<E>();
    if (this->gate_is_wide()) gate_as_given<float>(x);
    else gate_as_given<E>(x);
    ChannelGate const gates[2] = {{p.gate, s.gate_amplitude, s.gate_bias[2 * pair]},
                                  {p.gate, s.gate_amplitude, s.gate_bias[2 * pair + 1]}};
    gate_derivatives<E>(x, of_amplitude, [&](int j) { return columns.log2_decay(j); }, gates[0], gates[1]);
    float d_amplitude = 0.f;
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      float2 const d = this->row(j) < chunk.rows ? dg[j] : float2{0.f, 0.f};
      d_amplitude += d.x * of_amplitude[j].x + d.y * of_amplitude[j].y;
      dg[j] = d * x[j];
      sum = sum + dg[j];
    }
    s.gate_sum[group][pair] = sum;
    d_amplitude = warp_sum(d_amplitude);
    if (lane == 0) s.d_amplitude[warp] = d_amplitude;
  }
  /// Its place has had other things in it.
  template <class G>
  KDA_DEVICE void load_gate_again() {
    this->sync_team();
    this->template key_rows<G>(p.g, chunk, chunk.value_head)
        .template load<Base::kKeyTile>(s.template gate<G>(), 0, thread, kThreads);
    cp_async_commit();
    cp_async_wait<0>();
    this->sync_team();
  }
  template <class G>
  KDA_DEVICE void gate_as_given(float2 (&x)[kTokensPerThread]) {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      x[j] = tile::to_float2<G>(tile::load_pair<G>(&s.template gate<G>().at(this->row(j), 2 * pair)));
  }
  /// What this chunk adds to dA_log and ddt_bias.
  KDA_DEVICE void sum_over_tokens() {
    if (group == 0) {
      float2 sum{0.f, 0.f};
#pragma unroll
      for (auto const& of_group : s.gate_sum) sum = sum + of_group[pair];
      *reinterpret_cast<float2*>(&cell.sums().ddt_bias[this->first_channel + 2 * pair]) = sum;
    }
    if (thread) return;
    float sum = 0.f;
    for (float x : s.d_amplitude) sum += x;
    cell.sums().dA_log[slice()] = sum;
  }

  /// Through shared memory, in pieces of 16 bytes, a quarter of the warps each for dq, dk and dg. Of grouped heads dq
  /// and dk leave as fp32, to be summed later.
  KDA_DEVICE void store() {
    bool const grouped = call.dq_sum || call.dk_sum;
    if (grouped) put<float>(s.template dq<float>(), dq), put<float>(s.template dk<float>(), dk);
    else put<E>(s.template dq<E>(), dq), put<E>(s.template dk<E>(), dk);
    if (p.g.is_fp32) put<float>(s.template gate<float>(), dg);
    else put<E>(s.template gate<E>(), dg);
    this->sync_team();
    int const kind = warp % 4;
    Rows const& to = kind == 0 ? call.dq : kind == 1 ? call.dk : call.dg;
    if (kind == 3 || !to.data) return;
    if (kind < 2 && grouped)
      store_tile<float>(to, kind ? s.template dk<float>() : s.template dq<float>(), chunk.value_head);
    else if (kind < 2) store_tile<E>(to, kind ? s.template dk<E>() : s.template dq<E>(), chunk.head);
    else if (p.g.is_fp32) store_tile<float>(to, s.template gate<float>(), chunk.value_head);
    else store_tile<E>(to, s.template gate<E>(), chunk.value_head);
  }
  template <class T, class Tile>
  KDA_DEVICE void store_tile(Rows const& to, Tile const& tile, int head) const {
    this->template key_rows<T>(to, chunk, head).template store<Base::kKeyTile>(tile, 0, this->loader(), Base::kLoaders);
  }
  template <class T, class Tile>
  KDA_DEVICE void put(Tile& tile, float2 const (&x)[kTokensPerThread]) const {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j)
      tile::store_pair<T>(&tile.at(this->row(j), 2 * pair), tile::to_pair<T>(x[j].x, x[j].y));
  }
};

}  // namespace kda
