// What the threads of the keys kernel share, whichever way the chunk's decays go: inputs in registers, products with
// the states, results handed from the warps that multiply to the threads that have the channels, and sums over tokens.
#pragma once
#include "kda/chunk_bwd/keys_storage.h"

namespace kda {

template <class Variant>
struct KeysThread : ColumnThread<KeysSlice<Variant>, KeysStorage<Variant>, 1> {
  using Base = ColumnThread<KeysSlice<Variant>, KeysStorage<Variant>, 1>;
  using Base::group, Base::kBlocks, Base::kChunk, Base::kGroups, Base::kKeyTile, Base::kThreads, Base::kWarps,
      Base::lane, Base::pair, Base::s, Base::thread, Base::warp;
  using typename Base::E;
  using ValueTile = typename KeysStorage<Variant>::ValueTile;
  static constexpr int kSlices = KeysSlice<Variant>::kSlices;
  static constexpr int kOctets = kKeyTile / 8 / kWarps;
  static constexpr int kTeams = Base::Shape::kWarpsPerGroup, kTeamChannels = kKeyTile / kTeams;  // 64
  static_assert(kWarps == kBlocks * (kKeyTile / kResultColumns) && kOctets * kWarps * 8 == kKeyTile);
  static_assert(kGroups == kBlocks * (kTeamChannels / kResultColumns));

  ChunkBwdParams const& call;
  BackwardCell<Variant> const cell;
  ChunkOfHead const chunk;
  tile::Pair<E> raw_q[kTokensPerThread], raw_k[kTokensPerThread];
  float2 dq[kTokensPerThread], dk[kTokensPerThread], dg[kTokensPerThread];  // dg: of the log-decay
  KeyResults results;

  /// Every kTeams-th warp belongs to one team: it has all tokens of 64 channels, as inputs and as results.
  KDA_DEVICE int first_of_team() const { return warp % kTeams * kTeamChannels; }
  KDA_DEVICE int warp_of_team() const { return warp / kTeams; }
  KDA_DEVICE void sync_channels() const { sync_named(2 + warp % kTeams, kThreads / kTeams); }

  /// The warp's part of the results.
  KDA_DEVICE int block() const { return warp_of_team() % kBlocks; }
  KDA_DEVICE int channel0() const { return first_of_team() + warp_of_team() / kBlocks * kResultColumns; }

  KDA_DEVICE void keep_inputs() {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      raw_q[j] = Base::raw_q(j), raw_k[j] = Base::raw_k(j);
      dq[j] = dk[j] = dg[j] = {0.f, 0.f};
    }
  }

  KDA_DEVICE void take_gradients(KeysThread const& other) {
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) dq[j] = other.dq[j], dk[j] = other.dk[j], dg[j] = other.dg[j];
  }

  /// Score gradients and the first columns of V. A wide gate lies where these go.
  KDA_DEVICE void load_cell() { load_tile(0, s.scores, cell.score_gradients()); }

  /// results <- scale dO S_0^T, -dX S_0^T and U dS_C^T, and s.across. The first columns of V may be on their way.
  KDA_DEVICE void multiply_states() {
    float2 across[kOctets] = {};
    results = {};
    for (int tile = 0; tile < cell.tiles; ++tile) {
      if (tile) {
        this->sync_team();
        load_tile(tile);
      }
      cp_async_wait<0>();
      bringer().wait(tile % 2);
      this->sync_team();
      multiply_tile(s.tile);
      add_across(s.tile, across);
    }
#pragma unroll
    for (int n = 0; n < kResultColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) results.q[n].x[e] *= call.scale, results.k[n].x[e] = -results.k[n].x[e];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int bits = 4; bits < 32; bits *= 2)
        across[i].x += shuffle_xor(across[i].x, bits), across[i].y += shuffle_xor(across[i].y, bits);
      if (lane < 4) *reinterpret_cast<float2*>(&s.across[octet(i) + lane * 2]) = across[i];
    }
  }
  /// The result of one product for token j, as the thread that has its channels sees it.
  KDA_DEVICE float2 result(int buffer, int j) const {
    return *reinterpret_cast<float2 const*>(&s.results[buffer].at(this->row(j), 2 * pair));
  }
  KDA_DEVICE void give(int buffer, tile::Accumulator const (&d)[kResultColumns / 8]) {
#pragma unroll
    for (int n = 0; n < kResultColumns / 8; ++n)
      tile::store_accumulator<float>(s.results[buffer], block() * 16, channel0() + n * 8, d[n]);
  }

  /// The sum of x over the groups of eight tokens [first, end), after one barrier.
  KDA_DEVICE float2 sum_of_groups(int first, int end) const {
    float2 sum{0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
      if (i >= first && i < end) sum = sum + s.group_sum[i][pair];
    return sum;
  }
  /// d <- d times the factors of its channels.
  static KDA_DEVICE void scale(tile::Accumulator (&d)[kResultColumns / 8], float const* factor) {
#pragma unroll
    for (int n = 0; n < kResultColumns / 8; ++n) {
      float2 const f = *reinterpret_cast<float2 const*>(factor + n * 8 + lane_index() % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) d[n].x[e] *= e % 2 ? f.y : f.x;
    }
  }

  KDA_DEVICE auto bringer() const { return Bringer<Base::Shape::kConfig.wgmma, kThreads>{s.full, thread}; }

 private:
  /// A group of its own; `more`: what comes along.
  template <class... T>
  KDA_DEVICE void load_tile(int tile, T&... more) {
    auto& to = s.tile;
    int const first = tile * kValueTile;
    bringer().bring(to.u, cell.u(tile), to.state, cell.state(tile).panel(this->first_channel), to.d_state,
                    cell.d_state(tile).panel(this->first_channel), more...);
    bool const of_x = warp % 2;  // half of the warps bring dX, the others dO
    tile_rows<E>(of_x ? call.dv : call.d_o, chunk, chunk.value_head, first, call.value_dim - first)
        .template load<kValueTile>(of_x ? to.d_x : to.d_o, 0, warp / 2 * 32 + lane, kThreads / 2);
    cp_async_commit();
  }
  KDA_DEVICE void multiply_tile(ValueTile const& in) {
    int const row = block() * 16;
#pragma unroll
    for (int d = 0; d < kValueTile; d += 16) {
      auto const d_o = tile::load_left<E>(in.d_o, row, d), d_x = tile::load_left<E>(in.d_x, row, d);
      auto const u = tile::load_left_transposed<E>(in.u, d, row);
#pragma unroll
      for (int n = 0; n < kResultColumns / 8; n += 2) {
        auto const state = tile::load_right_transposed<E>(in.state, d, channel0() + n * 8);
        tile::multiply<E>(results.q[n], results.q[n + 1], d_o, state);
        tile::multiply<E>(results.k[n], results.k[n + 1], d_x, state);
        tile::multiply<E>(results.column[n], results.column[n + 1], u,
                          tile::load_right_transposed<E>(in.d_state, d, channel0() + n * 8));
      }
    }
  }
  KDA_DEVICE int octet(int i) const { return first_of_team() + (warp_of_team() * kOctets + i) * 8; }
  /// A warp has some eights of channels, a lane two of each and every eighth row.
  KDA_DEVICE void add_across(ValueTile const& in, float2 (&sum)[kOctets]) const {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      int const channel = octet(i) + lane % 4 * 2;
#pragma unroll
      for (int v = 0; v < kValueTile; v += 8) {
        float2 const a = tile::to_float2<E>(tile::load_pair<E>(&in.state.at(v + lane / 4, channel))),
                     b = tile::to_float2<E>(tile::load_pair<E>(&in.d_state.at(v + lane / 4, channel)));
        sum[i] = sum[i] + a * b;
      }
    }
  }
};

}  // namespace kda
