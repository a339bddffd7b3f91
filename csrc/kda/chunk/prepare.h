// Everything of a chunk that does not depend on the state. A team of threads walks over some chunks of one value head;
// while it solves one, q, k and g of the next are on their way.
//
//     T = (I + Diag(beta) A_kk)^-1 Diag(beta)      W = T (Gamma.K)      T V
#pragma once
#include "kda/chunk/prepare_thread.h"
#include "kda/chunk/scores.h"

namespace kda {

template <class Variant, int kTeams>
struct Prepare : PrepareThread<Variant, kTeams> {
  using Base = PrepareThread<Variant, kTeams>;
  using E = typename Base::E;
  using Shape = typename Base::Shape;
  using Base::columns, Base::group, Base::lane, Base::out, Base::p, Base::pair, Base::s, Base::thread, Base::warp;
  using typename Base::DiagonalElement;
  static constexpr int kChunk = Base::kChunk, kBlocks = Base::kBlocks, kKeyTile = Shape::kKeyTile;
  static constexpr int kThreads = Base::kThreads, kWarps = Base::kWarps;
  static constexpr int kBlockThreads = kTeams * kThreads, kBlocksPerSm = prepare_teams<Variant>() / kTeams;

  static constexpr int kNextFinder = kThreads - 64;  // a thread whose warp has neither beta nor V to load

  /// All chunks of one walker: of one value head, every p.walkers-th cell of the round, the `first` one first.
  KDA_DEVICE static void run(ChunkCall const& p, typename Base::Storage& s, int value_head, int32_t first) {
    Prepare{{{p, s}}}.start(value_head, first);
    int turn = 0;
    for (; is_inside(p, s.walk[turn].cell); turn ^= 1) {
      WalkedChunk const &now = s.walk[turn], &next = s.walk[turn ^ 1];
      Prepare prepare{{{p, s}, {p, now.cell, value_head}}};
      cp_async_wait<0>();
      Base::sync_team();
      prepare.begin(now.chunk);
      bool const finder = prepare.thread == kNextFinder;
      if (finder && p.round_index > 0 && p.progress) prepare.wait_until_free(now.cell, value_head);
      prepare.normalise();
      if (finder) prepare.look_ahead(now, s.walk[turn ^ 1], value_head);
      prepare.scores();
      prepare.solve(now.chunk, next.chunk, is_inside(p, next.cell));
    }
    if (!p.progress) return;
    Base::sync_team();
    if (Base::index_in_team() == kNextFinder) hand_over(p, s.walk[turn ^ 1], value_head);
  }

 private:
  KDA_DEVICE void start(int value_head, int32_t first) {
    if (thread == 0) {
      if (p.progress) {
        if (p.round_index == 0) wait_for_previous_kernel();  // its counters are zero now
        let_next_kernel_start();
      }
      s.walk[0] = find_chunk(value_head, p.last_first ? p.round_cells - 1 - first : first), s.walk[1].cell = -1;
    }
    this->load_gate_parameters(value_head);
    Base::sync_team();
    if (!is_inside(p, s.walk[0].cell)) return;
    this->load_inputs(s.walk[0].chunk);
    if (this->gate_is_wide()) this->load_wide_gate(s.walk[0].chunk);
  }

  KDA_DEVICE void wait_until_free(int32_t cell, int value_head) const {
    wait_flag(progress_of_record(p, cell, value_head).freed, p.round_index * value_tiles(p.value_dim));
  }
  /// One thread, some time after the chunk before has been written by all, so that little of it is still on its way:
  /// hands that one to the scan, and finds the chunk after this one.
  KDA_DEVICE void look_ahead(WalkedChunk const& now, WalkedChunk& other, int value_head) const {
    if (p.progress) hand_over(p, other, value_head);
    other = next_chunk(now, value_head);
  }
  KDA_DEVICE static void hand_over(ChunkCall const& p, WalkedChunk const& written, int value_head) {
    if (written.cell >= 0) set_flag(progress_of_record(p, written.cell, value_head).ready, p.round_index + 1);
  }

  KDA_DEVICE int32_t step() const { return p.last_first ? -p.walkers : p.walkers; }
  KDA_DEVICE static bool is_inside(ChunkCall const& p, int32_t cell) {
    return unsigned(cell) < unsigned(p.round_cells);
  }

  /// The first cell of the walk, from `cell` on, that has a chunk.
  KDA_DEVICE WalkedChunk find_chunk(int value_head, int32_t cell) const {
    ChunkPlan const plan = plan_of<Variant>(p);
    for (; is_inside(p, cell); cell += step()) {
      Sequence const sequence = plan.sequence(plan.sequence_of_cell(p.first_cell + cell));
      int64_t const i = p.first_cell + cell - sequence.first_cell;
      if (i >= 0 && i < plan.chunks_of(sequence.length))
        return {chunk_of_head<Variant>(p, sequence, i, value_head), cell, i, sequence.length};
      if (!p.progress) continue;
      wait_until_free(cell, value_head);  // or else a round that still waits would take this for its own
      raise_flag(progress_of_record(p, cell, value_head).freed, value_tiles(p.value_dim));
    }
    return {{}, cell, 0, 0};
  }
  KDA_DEVICE WalkedChunk next_chunk(WalkedChunk x, int value_head) const {
    x.cell += step(), x.index += step();
    int64_t const first = x.index * kChunk, remaining = x.length - first;
    if (!is_inside(p, x.cell) || first < 0 || remaining <= 0) return find_chunk(value_head, x.cell);
    x.chunk.begin += int64_t(step()) * kChunk, x.chunk.rows = int32_t(remaining < kChunk ? remaining : kChunk);
    return x;
  }

  /// V, now that the last chunk's has left, and the gate.
  KDA_DEVICE void begin(ChunkOfHead const& chunk) {
    if (warp % 4 == 3) load_values(chunk, 0, this->loader(), Base::kLoaders);
    cp_async_commit();
    float beta = 0.f;
    if (thread < chunk.rows) beta = load_beta<E>(p, chunk, thread);
    clear(s.a_qk);
    this->load_gate(chunk);
    if (thread >= kChunk) return;
    beta = write_strength(p, beta);
    if (of_backward()) beta = keep_share(beta, thread < chunk.rows);
    s.beta[thread] = thread < chunk.rows ? beta : 0.f;
  }

  KDA_DEVICE void scores() {
    if (this->any_steep()) scores_by(SplitScores<Base>{*this});
    else scores_by(BlockScores<Base>{*this});
  }

  /// W over Gamma.K and T V over V; then everything leaves. Each warp has its own columns, the first of them in
  /// registers before all scores are there.
  KDA_DEVICE void solve(ChunkOfHead const& chunk, ChunkOfHead const& next, bool has_next) {
    constexpr int kUnits = kKeyTile / 16, kTurns = 2 * kUnits / kWarps;
    static_assert(kTurns * kWarps == 2 * kUnits);
    auto const tile = [&](int unit) -> auto& { return unit < kUnits ? s.gamma_k : s.v; };
    tile::Accumulator x[kBlocks][2];
    load_columns(x, tile(warp), warp % kUnits * 16);
    this->sync_team();
    if (has_next) this->load_inputs(next);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      int const unit = turn * kWarps + warp;
      if (turn) load_columns(x, tile(unit), unit % kUnits * 16);
      solve_columns(x, tile(unit), unit % kUnits * 16);
    }
    this->sync_team();
    if (of_backward()) keep_for_backward(chunk);
    else copy(out.record().w.data, s.gamma_k.data);
    copy(out.record().a_qk.data, s.a_qk.data);
    store_values(0);
    for (int first = kKeyTile; first < p.value_dim; first += kKeyTile) {
      this->sync_team();
      load_values(chunk, first, thread, kThreads);
      cp_async_commit();
      cp_async_wait<0>();
      this->sync_team();
      for (int unit = warp; unit < kUnits; unit += kWarps) {
        load_columns(x, s.v, unit * 16);
        solve_columns(x, s.v, unit * 16);
      }
      this->sync_team();
      store_values(first);
    }
    if (has_next && this->gate_is_wide()) {
      this->sync_team();
      this->load_wide_gate(next);
    }
  }

  template <class Scores>
  KDA_DEVICE void scores_by(Scores scores) {
    scores.write();
    cp_async_wait<0>();  // V
    this->sync_team();
    scores.multiply();
  }
  KDA_DEVICE void load_values(ChunkOfHead const& chunk, int first, int index, int count) {
    tile_rows<E>(p.v, chunk, chunk.value_head, first, p.value_dim - first)
        .template load<kKeyTile>(s.v, 0, index, count);
  }
  template <class Tile>
  KDA_DEVICE void clear(Tile& t) {
    for (int i = thread; i < int(sizeof(Tile) / 16); i += kThreads) reinterpret_cast<uint4*>(&t)[i] = uint4{};
  }
  template <class T, int kCount>
  KDA_DEVICE void copy(T (&to)[kCount], T const (&from)[kCount]) {
    constexpr int kPieces = kCount * int(sizeof(T)) / 16;
#pragma unroll
    for (int i = 0; i < kPieces; i += kThreads)
      if (i + thread < kPieces)
        reinterpret_cast<uint4*>(to)[i + thread] = reinterpret_cast<uint4 const*>(from)[i + thread];
  }
  /// Its launches have one team in a block.
  KDA_DEVICE bool of_backward() const { return kTeams == 1 && p.inverse_offset; }
  KDA_DEVICE ChunkInverse<Variant>& kept_inverse() const {
    return *reinterpret_cast<ChunkInverse<Variant>*>(out.bytes + p.inverse_offset);
  }
  /// For the backward: the beta that counts. The first kChunk threads.
  KDA_DEVICE float keep_share(float beta, bool live) {
    float const share = live ? beta_share<E>(beta) : 1.f;
    kept_inverse().flags.beta_share[thread] = share;
    s.has_small_beta[thread] = share != 1.f;
    return at_least<E>(beta);
  }
  KDA_DEVICE void keep_for_backward(ChunkOfHead const& chunk) {
    auto& to = kept_inverse();
    store_rows(p.w, chunk, p.key_dim, s.gamma_k);
    if (p.l.data) store_rows(p.l, chunk, kChunk, s.l);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) copy(to.diagonal[i].x, s.diagonal[i].x);
    copy(to.norm, s.norm);
    if (thread) return;
    bool any = false;
    for (bool small : s.has_small_beta) any = any || small;
    to.flags.has_small_beta = any, to.flags.steep = this->any_steep();
    to.flags.nothing[0] = to.flags.nothing[1] = 0;
  }
  /// The rows of the chunk's tokens; those behind its last one are zero, and whoever loads them knows that.
  template <class Tile>
  KDA_DEVICE void store_rows(Rows const& to, ChunkOfHead const& chunk, int columns, Tile const& tile) const {
    tile_rows<E>(to, chunk, chunk.value_head, 0, columns).template store<Tile::kCols>(tile, 0, thread, kThreads);
  }
  /// The tiles of 64 columns that lie in the panels of s.v, one behind the other.
  KDA_DEVICE void store_values(int first) {
    using Values = typename Base::Record::Values;
    auto const* const tiles = reinterpret_cast<Values const*>(s.v.data);
    for (int i = 0; i < kKeyTile / kValueTile && first + i * kValueTile < p.value_dim; ++i)
      copy(out.values(first / kValueTile + i).data, tiles[i].data);
  }

  /// x <- Diag(beta) times sixteen columns of the tile, transposed.
  KDA_DEVICE void load_columns(tile::Accumulator (&x)[kBlocks][2], typename Base::Storage::Wide const& tile,
                               int column) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      tile::load_transposed<E>(x[i][0], x[i][1], tile, i * 16, column);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[i][e / 4].x[e % 4] *= s.beta[i * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2];
    }
  }
  /// The columns <- the solution.
  KDA_DEVICE void solve_columns(tile::Accumulator (&x)[kBlocks][2], typename Base::Storage::Wide& tile, int column) {
    tile::substitute<E, DiagonalElement>(x, s.l, s.diagonal);
    sync_warp();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      tile::store_transposed<E, Shape::kConfig.wgmma>(tile, i * 16, column, x[i][0], x[i][1]);
  }
};

/// Blocks that fill an SM.
template <class Variant>
using PrepareTeams = Prepare<Variant, prepare_teams<Variant>()>;

}  // namespace kda
