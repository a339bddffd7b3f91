// The gradients of q, k and the gate where one anchor for each block of 16 tokens serves (scores.h, BlockScores).
//
// A result gathers, anchor by anchor, everything that reaches a block: D <- D decay + product. So each operand is
// decayed from its own anchor alone. What flows through a token is the flow at the end of the chunk, less what leaves
// and plus what arrives behind the token: rows give, columns take. Both are products of the same rounded operands, so
// what cancels cancels to rounding.
#pragma once
#include "kda/chunk/scores.h"
#include "kda/chunk_bwd/keys_thread.h"

namespace kda {

template <class Variant>
struct AnchoredGradients {
  using Thread = KeysThread<Variant>;
  using E = typename Thread::E;
  static constexpr int kBlocks = Thread::kBlocks, kGroups = Thread::kGroups;
  Thread& c;

  /// What products with the scores take. While tiles of V are on their way.
  KDA_DEVICE void write() {
    write_operands();
    write_decays();
  }
  /// After the products with the states.
  KDA_DEVICE void gather() {
    gather_scores();
    c.sync_team();
    take_results();
  }

 private:
  /// Over the raw inputs of this thread, which are in registers.
  KDA_DEVICE void write_operands() {
    for_each_from_anchor(c, [&](int j, float2 log2_e) {
      float2 const e = Thread::exp2(log2_e), k = c.k(j, c.raw_k[j]);
      int const row = c.row(j);
      c.store(c.s.blocks.q, row, c.q(j, c.raw_q[j]) * e);
      c.store(c.s.blocks.k, row, k * e);
      c.store(c.s.blocks.k_inverse, row, k * Thread::exp2(Thread::both(-1.f) * log2_e));
    });
  }
  /// Block b has its anchor between the groups 2 b and 2 b + 1.
  KDA_DEVICE void write_decays() {
    int const b = c.group, channel = 2 * c.pair;
    auto const write = [&](float* to, int first, int end) {
      *reinterpret_cast<float2*>(to + channel) = Thread::exp2(c.log2_groups(first, end));
    };
    if (b <= kBlocks) write(c.s.step[b], b ? 2 * b - 1 : 0, b < kBlocks ? 2 * b + 1 : kGroups);
    if (b < kBlocks) write(c.s.to_end[b], 2 * b + 1, kGroups);
  }

  KDA_DEVICE void gather_scores() {
    int const block = c.block(), channel = c.channel0();
    auto& r = c.results;
    auto const& scores = c.s.scores;
    keep_flux_to_end(block, channel);
    for (int j = 0; j <= block; ++j) {
      Thread::scale(r.q, &c.s.step[j][channel]), Thread::scale(r.k, &c.s.step[j][channel]);
      auto const qk = tile::load_left<E>(scores.qk, block * 16, j * 16),
                 kk = tile::load_left<E>(scores.kk, block * 16, j * 16);
#pragma unroll
      for (int n = 0; n < kResultColumns / 8; n += 2) {
        auto const k = tile::load_right_transposed<E>(c.s.blocks.k_inverse, j * 16, channel + n * 8);
        tile::multiply<E>(r.q[n], r.q[n + 1], qk, k);
        tile::multiply<E>(r.k[n], r.k[n + 1], kk, k);
      }
    }
    for (int j = kBlocks - 1; j >= block; --j) {
      Thread::scale(r.column, &c.s.step[j + 1][channel]);
      auto const qk = tile::load_left_transposed<E>(scores.qk, j * 16, block * 16),
                 kk = tile::load_left_transposed<E>(scores.kk, j * 16, block * 16);
#pragma unroll
      for (int n = 0; n < kResultColumns / 8; n += 2) {
        tile::multiply<E>(r.column[n], r.column[n + 1], qk,
                          tile::load_right_transposed<E>(c.s.blocks.q, j * 16, channel + n * 8));
        tile::multiply<E>(r.column[n], r.column[n + 1], kk,
                          tile::load_right_transposed<E>(c.s.blocks.k, j * 16, channel + n * 8));
      }
    }
  }
  /// What the columns of the block give to the state at the end, summed over its tokens.
  KDA_DEVICE void keep_flux_to_end(int block, int channel0) {
#pragma unroll
    for (int n = 0; n < kResultColumns / 8; ++n) {
      float2 sum{0.f, 0.f};
      tile::for_pairs([&](int row, int column, int e) {
        float2 const k = tile::to_float2<E>(
            tile::load_pair<E>(&c.s.blocks.k_inverse.at(block * 16 + row, channel0 + n * 8 + column)));
        sum = sum + k * float2{c.results.column[n].x[e], c.results.column[n].x[e + 1]};
      });
#pragma unroll
      for (int bits = 4; bits < 32; bits *= 2) sum.x += shuffle_xor(sum.x, bits), sum.y += shuffle_xor(sum.y, bits);
      int const channel = channel0 + n * 8 + c.lane * 2;
      if (c.lane < 4)
        *reinterpret_cast<float2*>(&c.s.end_flux[block][channel]) =
            sum * *reinterpret_cast<float2 const*>(&c.s.to_end[block][channel]);
    }
  }

  KDA_DEVICE void take_results() {
    float2 rise[kTokensPerThread];  // what the flow gains at a token, seen from the end
    auto const operand = [&](auto const& tile, int j) {
      return tile::to_float2<E>(tile::load_pair<E>(&tile.at(c.row(j), 2 * c.pair)));
    };
    c.give(0, c.results.q), c.give(1, c.results.k);
    c.sync_channels();
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      c.dq[j] = c.result(0, j), c.dk[j] = c.result(1, j);
      rise[j] = operand(c.s.blocks.q, j) * c.dq[j] + operand(c.s.blocks.k, j) * c.dk[j];
    }
    c.sync_channels();
    c.give(0, c.results.column);
    c.sync_channels();
    float2 column[kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      column[j] = c.result(0, j);
      rise[j] = rise[j] + Thread::both(-1.f) * operand(c.s.blocks.k_inverse, j) * column[j];
    }
    for_each_from_anchor(c, [&](int j, float2 log2_e) {
      float2 const e = Thread::exp2(log2_e);
      c.dq[j] = c.dq[j] * e;
      c.dk[j] = c.dk[j] * e + column[j] * Thread::exp2(Thread::both(-1.f) * log2_e);
    });
#pragma unroll
    for (int j = kTokensPerThread - 1; j > 0; --j) rise[j - 1] = rise[j - 1] + rise[j];
    c.s.group_sum[c.group][c.pair] = rise[0];
    c.sync_channels();
    float2 const behind = c.sum_of_groups(c.group + 1, kGroups) + flux_at_end();
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) c.dg[j] = rise[j] + behind;
  }
  KDA_DEVICE float2 flux_at_end() const {
    int const channel = 2 * c.pair;
    float2 flux = Thread::exp2(c.log2_groups(0, kGroups)) * *reinterpret_cast<float2 const*>(&c.s.across[channel]);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) flux = flux + *reinterpret_cast<float2 const*>(&c.s.end_flux[b][channel]);
    return flux;
  }
};

}  // namespace kda
