// A few steps of the recurrence (docs/mathematics.md, section 1) on one run of values of one head of one sequence per
// block. The state is read once and written once; everything else is small beside it.
#pragma once
#include "kda/decode/state_tile.h"
#include "kda/decode/token.h"

namespace kda {

template <class Shape>
struct DecodeStorage {
  typename StateTile<Shape>::Exchange exchange[2];  // by turns, so that one barrier a token is enough
  DecodeToken<Shape::kKeyTile, Shape::kValueTile> tokens[kStagedTokens];

  /// For sequences of at most `count` tokens.
  static size_t bytes(int64_t count) {
    return sizeof(DecodeStorage) - size_t(count < kStagedTokens ? kStagedTokens - count : 0) * sizeof(tokens[0]);
  }
};

/// S' = Diag(exp g) S;  u = beta (v - S'^T k);  o = scale (S'^T q + (q . k) u);  S = S' + k u^T.
/// `v`: of the tile's values. `output(value in the tile, o, u)` is called by one thread per value.
template <class Tile, class Token, class F>
KDA_DEVICE void decode_step(Tile& tile, Token const& token, float const* v, typename Tile::Exchange& exchange,
                            float scale, F output) {
  tile.decay(token.decay);
  tile.project(token.k, token.q, exchange);
  float own[Tile::kOwn], u[Tile::kUpdates];
  tile.key_sums(own, exchange);
#pragma unroll
  for (int i = 0; i < Tile::kOwn; ++i) own[i] = token.beta * (v[tile.own(i)] - own[i]);
  if (tile.writes_output()) {
    float on_query[Tile::kOwn];
    tile.query_sums(on_query, exchange);
#pragma unroll
    for (int i = 0; i < Tile::kOwn; ++i)
      output(tile.own(i), scale * fmaf(token.query_on_key, own[i], on_query[i]), own[i]);
  }
  tile.spread(u, own);
  tile.add(token.k, u);
}

/// Where the results of one token go.
struct DecodeOutput {
  DecodeParams const& p;
  int64_t o, record;
  int values;

  KDA_DEVICE DecodeOutput(DecodeParams const& params, DecodeWork const& work, int64_t t)
      : p(params),
        o(work.offset(p.o_strides, t, work.value_head) + work.first_value),
        record(work.record_offset(p, t, p.value_heads, work.value_head, p.value_dim) + work.first_value),
        values(p.value_dim - work.first_value) {}
  KDA_DEVICE void operator()(int value, float output, float u) const {
    if (value >= values) return;
    store_float(p.o, p.dtype, o + value, output);
    if (p.records.u) p.records.u[record + value] = u;
  }
};

/// First of all in every kernel: they are launched early, and the next one may be, as soon as all blocks have room.
/// What a launch costs then passes while the kernel ahead still runs.
KDA_DEVICE void take_over() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

/// The outputs of tokens first, first + step, ... before `end`, counted from the first one of the sequence.
KDA_DEVICE void zero_outputs(DecodeParams const& p, DecodeWork const& work, int64_t first, int64_t end, int64_t step,
                             int value_tile, int threads) {
  for (int64_t t = first; t < end; t += step)
    for (int i = thread_index(); i < value_tile && work.first_value + i < p.value_dim; i += threads)
      store_float(p.o, p.dtype, work.offset(p.o_strides, t, work.value_head) + work.first_value + i, 0.f);
}
/// A sequence in a null slot has outputs of zero.
KDA_DEVICE void zero_sequence(DecodeParams const& p, DecodeWork const& work, int value_tile, int threads) {
  zero_outputs(p, work, 0, work.tokens, 1, value_tile, threads);
}
/// So have the tokens after the last sequence, which a captured graph has when it runs with fewer: sequences take
/// turns.
KDA_DEVICE void zero_others(DecodeParams const& p, DecodeWork const& work, int value_tile, int threads) {
  zero_outputs(p, work, work.others + work.sequence - work.begin, p.tokens - work.begin, p.sequences, value_tile,
               threads);
}

/// The tokens of a sequence: prepare(first, count) by all threads puts some into storage.tokens, step(i, t) takes
/// token t, the i-th of them. The state, on its way since before, is in its registers from the first step on.
template <class Shape, class Prepare, class Step>
KDA_DEVICE void for_tokens(StateTile<Shape>& tile, int64_t tokens, Prepare prepare, Step step) {
  int64_t first = 0;
  do {
    int const count = int(tokens - first < kStagedTokens ? tokens - first : kStagedTokens);
    prepare(first, count);
    sync_block();
    if (first == 0) tile.finish_fetch();
#pragma unroll 1
    for (int i = 0; i < count; ++i) step(i, first + i);
    first += kStagedTokens;
    if (first < tokens) sync_block();  // before the tokens are overwritten
  } while (first < tokens);
}

template <class Shape>
KDA_GLOBAL void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM) decode_kernel(DecodeParams const p) {
  using State = typename Shape::State;
  KDA_DYNAMIC_SHARED(DecodeStorage<Shape>, storage);
  take_over();
  DecodeWork const work(p, p.value_heads, Shape::kValueTile);
  int64_t const from = work.state_offset(p.state, p, work.first_column(p));
  if (p.cu_seqlens.data) zero_others(p, work, Shape::kValueTile, Shape::kThreads);
  if (p.state.data && from < 0) return zero_sequence(p, work, Shape::kValueTile, Shape::kThreads);
  if (work.tokens == 0 && (p.every_token || work.keeps_state(p, from))) return;

  StateTile<Shape> tile(p, work.first_value);
  tile.fetch(p.state.data ? static_cast<State const*>(p.state.data) + from : nullptr);
  auto const store = [&](int64_t column) {
    int64_t const to = work.state_offset(p.new_state, p, column);
    if (to >= 0) tile.store(static_cast<State*>(p.new_state.data) + to);
  };
  for_tokens<Shape>(
      tile, work.tokens,
      [&](int64_t first, int count) { prepare_tokens<Shape>(storage->tokens, p, work, first, Neighbours{}, count); },
      [&](int i, int64_t t) {
        auto const& token = storage->tokens[i];
        decode_step(tile, token, token.v, storage->exchange[i % 2], p.scale, DecodeOutput(p, work, t));
        if (p.every_token) store(t);
      });
  if (p.new_state.data && !p.every_token) store(0);
}

/// Whether token t is the parent of another one. All lanes of a warp.
KDA_DEVICE bool has_child(DecodeParams const& p, DecodeWork const& work, int64_t t) {
  for (int64_t first = t + 1; first < work.tokens; first += 32) {
    int64_t const other = first + lane_index();
    if (warp_any(other < work.tokens && work.parent(p, other) == t)) return true;
  }
  return false;
}

template <class Shape>
struct DecodeTreeStorage {
  DecodeStorage<Shape> steps;
  int64_t path[kStagedTokens];  // which tokens are in steps.tokens
};

/// decode_kernel for trees. Every path from the root to a leaf is a chain that starts from the stored state. What paths
/// have in common is computed once for each of them, from the same numbers in the same order: its bits are equal, and
/// no state is kept beside the registers. One kernel for states that lie anywhere serves them all.
template <class Shape>
KDA_GLOBAL void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM) decode_tree_kernel(DecodeParams const p) {
  using State = typename Shape::State;
  KDA_DYNAMIC_SHARED(DecodeTreeStorage<Shape>, storage);
  take_over();
  DecodeWork const work(p, p.value_heads, Shape::kValueTile);
  int64_t const from = work.state_offset(p.state, p, work.first_column(p));
  if (p.cu_seqlens.data) zero_others(p, work, Shape::kValueTile, Shape::kThreads);
  if (p.state.data && from < 0) return zero_sequence(p, work, Shape::kValueTile, Shape::kThreads);

  StateTile<Shape> tile(p, work.first_value);
#pragma unroll 1
  for (int64_t leaf = 0; leaf < work.tokens; ++leaf) {
    if (has_child(p, work, leaf)) continue;
    TreePath const path(p, work, leaf);
    sync_block();  // the path before has been read
    tile.fetch(p.state.data ? static_cast<State const*>(p.state.data) + from : nullptr);
    for_tokens<Shape>(
        tile, path.length,
        [&](int64_t first, int count) {
          int const i = thread_index();
          if (i < count) storage->path[i] = path.token(p, work, first + i);
          sync_block();
          prepare_tokens<Shape>(storage->steps.tokens, p, work, 0, Scattered{storage->path, count}, count);
        },
        [&](int i, int64_t) {
          auto const& token = storage->steps.tokens[i];
          int64_t const t = storage->path[i];
          decode_step(tile, token, token.v, storage->steps.exchange[i % 2], p.scale, DecodeOutput(p, work, t));
          if (!p.every_token) return;
          int64_t const to = work.state_offset(p.new_state, p, t);
          if (to >= 0) tile.store(static_cast<State*>(p.new_state.data) + to);
        });
  }
}

/// S = Diag(exp g) S + k u^T for the accepted tokens, in the order and with the roundings of decode_kernel.
template <class Shape, class Path>
KDA_DEVICE void commit_path(DecodeStorage<Shape>* storage, DecodeCommitParams const& p) {
  using State = typename Shape::State;
  take_over();
  DecodeWork const work(p, p.value_heads, Shape::kValueTile);
  Path const path(p, work);
  int64_t const from = work.state_offset(p.state, p, 0), to = work.state_offset(p.new_state, p, 0);
  if (from < 0 || to < 0 || (path.length == 0 && work.keeps_state(p, from))) return;

  StateTile<Shape> tile(p, work.first_value);
  tile.fetch(static_cast<State const*>(p.state.data) + from);
  for_tokens<Shape>(
      tile, path.length,
      [&](int64_t first, int count) {
#pragma unroll 1
        for (int i = thread_index() / 32; i < count; i += Shape::kWarps)
          load_records(storage->tokens[i], p, work, path.token(p, work, first + i));
      },
      [&](int i, int64_t) {
        auto const& token = storage->tokens[i];
        float u[StateTile<Shape>::kUpdates];
        tile.decay(token.decay);
        tile.read_updates(u, token.v);
        tile.add(token.k, u);
      });
  tile.store(static_cast<State*>(p.new_state.data) + to);
}

template <class Shape>
KDA_GLOBAL void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM)
    decode_commit_kernel(DecodeCommitParams const p) {
  KDA_DYNAMIC_SHARED(DecodeStorage<Shape>, storage);
  commit_path<Shape, AcceptedChain>(storage, p);
}
template <class Shape>
KDA_GLOBAL void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM)
    decode_commit_tree_kernel(DecodeCommitParams const p) {
  KDA_DYNAMIC_SHARED(DecodeTreeStorage<Shape>, storage);
  commit_path<Shape, TreePath>(&storage->steps, p);
}

}  // namespace kda
