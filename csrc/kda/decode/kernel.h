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
/// Of a sequence in a null slot.
KDA_DEVICE void zero_sequence(DecodeParams const& p, DecodeWork const& work, int value_tile, int threads) {
  zero_outputs(p, work, 0, work.tokens, 1, value_tile, threads);
}
/// Of the tokens after the last sequence, which a captured graph has when it is replayed with fewer: sequences take
/// turns.
KDA_DEVICE void zero_others(DecodeParams const& p, DecodeWork const& work, int value_tile, int threads) {
  zero_outputs(p, work, work.others + work.sequence - work.begin, p.tokens - work.begin, p.sequences, value_tile,
               threads);
}

/// The tokens of a sequence: prepare(first, count) by all threads puts some into storage.tokens, step(i, t) takes
/// token t, the i-th of them. The state, on its way since before, is in its registers from the first step on.
template <class Shape, class Prepare, class Step>
KDA_DEVICE void for_tokens(StateTile<Shape>& tile, DecodeWork const& work, Prepare prepare, Step step) {
  int64_t first = 0;
  do {
    int const count = int(work.tokens - first < kStagedTokens ? work.tokens - first : kStagedTokens);
    prepare(first, count);
    sync_block();
    if (first == 0) tile.finish_fetch();
#pragma unroll 1
    for (int i = 0; i < count; ++i) step(i, first + i);
    first += kStagedTokens;
    if (first < work.tokens) sync_block();  // before the tokens are overwritten
  } while (first < work.tokens);
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
      tile, work, [&](int64_t first, int count) { prepare_tokens<Shape>(storage->tokens, p, work, first, count); },
      [&](int i, int64_t t) {
        auto const& token = storage->tokens[i];
        decode_step(tile, token, token.v, storage->exchange[i % 2], p.scale, DecodeOutput(p, work, t));
        if (p.every_token) store(t);
      });
  if (p.new_state.data && !p.every_token) store(0);
}

/// S = Diag(exp g) S + k u^T for the accepted tokens, in the order and with the roundings of decode_kernel.
template <class Shape>
KDA_GLOBAL void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSM)
    decode_commit_kernel(DecodeCommitParams const p) {
  using State = typename Shape::State;
  KDA_DYNAMIC_SHARED(DecodeStorage<Shape>, storage);
  take_over();
  DecodeWork work(p, p.value_heads, Shape::kValueTile);
  int64_t const accepted = p.accepted.at(work.sequence);
  if (accepted < work.tokens) work.tokens = accepted > 0 ? accepted : 0;
  int64_t const from = work.state_offset(p.state, p, 0), to = work.state_offset(p.new_state, p, 0);
  if (from < 0 || to < 0 || (work.tokens == 0 && work.keeps_state(p, from))) return;

  StateTile<Shape> tile(p, work.first_value);
  tile.fetch(static_cast<State const*>(p.state.data) + from);
  for_tokens<Shape>(
      tile, work,
      [&](int64_t first, int count) {
#pragma unroll 1
        for (int i = thread_index() / 32; i < count; i += Shape::kWarps)
          load_records(storage->tokens[i], p, work, first + i);
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

}  // namespace kda
