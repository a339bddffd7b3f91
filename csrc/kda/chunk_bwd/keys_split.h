// The gradients of q, k and the gate by splits of the chunk, for any gate (scores.h, SplitScores). A token is on one
// side of each split: above its anchor as a row, below as a column; so it has one operand and one result at a level.
//
// The gate of a token gets only the paths that it decays, all with their own sign: rows from it on in the upper half,
// columns before it in the lower half.
#pragma once
#include "kda/chunk_bwd/keys_thread.h"

namespace kda {

template <class Variant>
struct SplitGradients {
  using Thread = KeysThread<Variant>;
  using E = typename Thread::E;
  static constexpr int kChunk = Thread::kChunk, kBlocks = Thread::kBlocks, kGroups = Thread::kGroups;
  Thread& c;

  /// After the products with the states.
  KDA_DEVICE void run() {
    c.columns.exponentiate();
    c.sync_team();
    take_rows_of_states();
    c.sync_channels();
    take_columns_of_states();
    level<kChunk / 2>();
  }

 private:
  /// Rows from the start of the chunk; and what goes from its start to its end.
  KDA_DEVICE void take_rows_of_states() {
    c.give(0, c.results.q), c.give(1, c.results.k);
    c.sync_channels();
    float2 const across =
        Thread::exp2(c.log2_groups(0, kGroups)) * *reinterpret_cast<float2 const*>(&c.s.across[2 * c.pair]);
    float2 decay = Thread::exp2(c.log2_groups(0, c.group)), rows[kTokensPerThread];
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      decay = decay * c.columns.decay(j);
      rows[j] = take_row(j, decay);
      c.dg[j] = across;
    }
    add_rows(rows, kGroups);
  }
  /// Columns to the end of the chunk.
  KDA_DEVICE void take_columns_of_states() {
    c.give(1, c.results.column);
    c.sync_channels();
    float2 decay = Thread::exp2(c.log2_groups(c.group + 1, kGroups)), columns[kTokensPerThread];
#pragma unroll
    for (int j = kTokensPerThread - 1; j >= 0; --j) {
      columns[j] = take_column(j, decay);
      decay = decay * c.columns.decay(j);
    }
    add_columns(columns, 0);
  }

  template <int kHalf>
  KDA_DEVICE void level() {
    if constexpr (kHalf >= 1) {
      for_sides<kHalf>([&](int j, bool upper, float2 decay) {
        c.store(c.s.blocks.q, c.row(j), upper ? c.q(j, c.raw_q[j]) * decay : float2{0.f, 0.f});
        c.store(c.s.blocks.k, c.row(j), c.k(j, c.raw_k[j]) * decay);
      });
      c.sync_channels();
      multiply<kHalf>();
      c.sync_channels();
      c.give(0, c.results.q), c.give(1, c.results.k);
      c.sync_channels();
      float2 paths[kTokensPerThread];
      for_sides<kHalf>(
          [&](int j, bool upper, float2 decay) { paths[j] = upper ? take_row(j, decay) : take_column(j, decay); });
      if constexpr (kHalf >= kTokensPerThread) add_paths_of_groups<kHalf / kTokensPerThread>(paths);
      else add_paths_within<kHalf>(paths);
      level<kHalf / 2>();
    }
  }

  /// f(token j, whether it is above its anchor, the decay between both), from the anchor outwards.
  template <int kHalf, class F>
  KDA_DEVICE void for_sides(F f) const {
    if constexpr (kHalf >= kTokensPerThread) {
      constexpr int kGroupsOfHalf = kHalf / kTokensPerThread;
      int const first = c.group / kGroupsOfHalf * kGroupsOfHalf;
      if (c.row(0) & kHalf) for_rows(f, 0, kTokensPerThread, Thread::exp2(c.log2_groups(first, c.group)));
      else for_columns(f, 0, kTokensPerThread, Thread::exp2(c.log2_groups(c.group + 1, first + kGroupsOfHalf)));
    } else {
#pragma unroll
      for (int first = 0; first < kTokensPerThread; first += 2 * kHalf) {
        for_columns(f, first, kHalf, {1.f, 1.f});
        for_rows(f, first + kHalf, kHalf, {1.f, 1.f});
      }
    }
  }
  template <class F>
  KDA_DEVICE void for_rows(F f, int first, int count, float2 decay) const {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      decay = decay * c.columns.decay(first + n);
      f(first + n, true, decay);
    }
  }
  template <class F>
  KDA_DEVICE void for_columns(F f, int first, int count, float2 decay) const {
#pragma unroll
    for (int n = count - 1; n >= 0; --n) {
      f(first + n, false, decay);
      decay = decay * c.columns.decay(first + n);
    }
  }

  /// Adds results to dq and dk; what they contribute to the gates between token and anchor.
  KDA_DEVICE float2 take_row(int j, float2 decay) {
    float2 const q = decay * c.result(0, j), k = decay * c.result(1, j);
    c.dq[j] = c.dq[j] + q, c.dk[j] = c.dk[j] + k;
    return c.q(j, c.raw_q[j]) * q + c.k(j, c.raw_k[j]) * k;
  }
  KDA_DEVICE float2 take_column(int j, float2 decay) {
    float2 const k = decay * c.result(1, j);
    c.dk[j] = c.dk[j] + k;
    return c.k(j, c.raw_k[j]) * k;
  }

  /// dg_t += the rows from t on, of the groups before `end`.
  KDA_DEVICE void add_rows(float2 (&rows)[kTokensPerThread], int end) {
#pragma unroll
    for (int j = kTokensPerThread - 1; j > 0; --j) rows[j - 1] = rows[j - 1] + rows[j];
    c.s.group_sum[c.group][c.pair] = rows[0];
    c.sync_channels();
    float2 const behind = c.sum_of_groups(c.group + 1, end);
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) c.dg[j] = c.dg[j] + rows[j] + behind;
  }
  /// dg_t += the columns before t, of the groups from `first` on.
  KDA_DEVICE void add_columns(float2 (&columns)[kTokensPerThread], int first) {
    float2 sum = columns[0];
#pragma unroll
    for (int j = 1; j < kTokensPerThread; ++j) sum = sum + columns[j];
    c.s.group_sum[c.group][c.pair] = sum;
    c.sync_channels();
    sum = c.sum_of_groups(first, c.group);
#pragma unroll
    for (int j = 0; j < kTokensPerThread; ++j) {
      c.dg[j] = c.dg[j] + sum;
      sum = sum + columns[j];
    }
  }
  template <int kGroupsOfHalf>
  KDA_DEVICE void add_paths_of_groups(float2 (&paths)[kTokensPerThread]) {
    int const first = c.group / kGroupsOfHalf * kGroupsOfHalf;
    bool const upper = c.group / kGroupsOfHalf % 2;
    float2 sum = paths[0];
#pragma unroll
    for (int j = 1; j < kTokensPerThread; ++j) sum = sum + paths[j];
    c.s.group_sum[c.group][c.pair] = sum;
    c.sync_channels();
    sum = upper ? c.sum_of_groups(c.group + 1, first + kGroupsOfHalf) : c.sum_of_groups(first, c.group);
    add_paths(paths, 0, kTokensPerThread, upper, sum);
  }
  template <int kHalf>
  KDA_DEVICE void add_paths_within(float2 (&paths)[kTokensPerThread]) {
#pragma unroll
    for (int first = 0; first < kTokensPerThread; first += kHalf)
      add_paths(paths, first, kHalf, first / kHalf % 2, {0.f, 0.f});
  }
  KDA_DEVICE void add_paths(float2 (&paths)[kTokensPerThread], int first, int count, bool upper, float2 sum) {
    if (upper) {
#pragma unroll
      for (int n = count - 1; n >= 0; --n) {
        sum = sum + paths[first + n];
        c.dg[first + n] = c.dg[first + n] + sum;
      }
    } else {
#pragma unroll
      for (int n = 0; n < count; ++n) {
        c.dg[first + n] = c.dg[first + n] + sum;
        sum = sum + paths[first + n];
      }
    }
  }

  /// D^q and D^k of rows against columns k, D^k of columns against rows q and k, of this warp's block of tokens.
  template <int kHalf>
  KDA_DEVICE void multiply() {
    int const block = c.block();
    c.results = {};
    if constexpr (kHalf >= kTokensPerBlock) {
      constexpr int kBlocksOfHalf = kHalf / kTokensPerBlock;
      bool const upper = block / kBlocksOfHalf % 2;
      int const other = (block / kBlocksOfHalf + (upper ? -1 : 1)) * kBlocksOfHalf;
      for (int j = other; j < other + kBlocksOfHalf; ++j) {
        if (upper) multiply_rows(block, j, [](int, int) { return true; });
        else multiply_columns(block, j, [](int, int) { return true; });
      }
    } else {
      auto const separates = [](int row, int column) {
        return row / (2 * kHalf) == column / (2 * kHalf) && (row & kHalf) && !(column & kHalf);
      };
      multiply_rows(block, block, separates);
      multiply_columns(block, block, [&](int column, int row) { return separates(row, column); });
    }
  }
  template <class F>
  KDA_DEVICE void multiply_rows(int block, int j, F keep) {
    auto qk = tile::load_left<E>(c.s.scores.qk, block * 16, j * 16);
    auto kk = tile::load_left<E>(c.s.scores.kk, block * 16, j * 16);
    tile::mask_left<E>(qk, keep), tile::mask_left<E>(kk, keep);
#pragma unroll
    for (int n = 0; n < kResultColumns / 8; n += 2) {
      auto const k = tile::load_right_transposed<E>(c.s.blocks.k, j * 16, c.channel0() + n * 8);
      tile::multiply<E>(c.results.q[n], c.results.q[n + 1], qk, k);
      tile::multiply<E>(c.results.k[n], c.results.k[n + 1], kk, k);
    }
  }
  template <class F>
  KDA_DEVICE void multiply_columns(int block, int j, F keep) {
    auto qk = tile::load_left_transposed<E>(c.s.scores.qk, j * 16, block * 16);
    auto kk = tile::load_left_transposed<E>(c.s.scores.kk, j * 16, block * 16);
    tile::mask_left<E>(qk, keep), tile::mask_left<E>(kk, keep);
#pragma unroll
    for (int n = 0; n < kResultColumns / 8; n += 2) {
      auto& k = c.results.k;
      tile::multiply<E>(k[n], k[n + 1], qk, tile::load_right_transposed<E>(c.s.blocks.q, j * 16, c.channel0() + n * 8));
      tile::multiply<E>(k[n], k[n + 1], kk, tile::load_right_transposed<E>(c.s.blocks.k, j * 16, c.channel0() + n * 8));
    }
  }
};

/// Steep chunks are rare. Apart from what calls it this takes no registers from the usual way: `thread`, in memory, has
/// inputs and products, and gets the gradients.
template <class Variant>
KDA_OUTLINED void add_split_gradients(KeysThread<Variant>& thread) {
  KDA_DYNAMIC_SHARED(KeysStorage<Variant>, storage);
  KeysThread<Variant> own{
      {thread.p, *storage, thread.columns, thread.first_channel}, thread.call, thread.cell, thread.chunk};
#pragma unroll
  for (int j = 0; j < kTokensPerThread; ++j) own.raw_q[j] = thread.raw_q[j], own.raw_k[j] = thread.raw_k[j];
  own.results = thread.results;
  own.take_gradients(thread);
  SplitGradients<Variant>{own}.run();
  thread.take_gradients(own);
}

}  // namespace kda
