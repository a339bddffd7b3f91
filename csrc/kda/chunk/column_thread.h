// A thread that has two key channels of eight tokens of a chunk: what it knows of q, k and the gate.
#pragma once
#include "kda/chunk/gate_columns.h"
#include "kda/chunk/record.h"
#include "kda/chunk/tile_rows.h"

namespace kda {

/// `Storage` has the tiles that q, k and g arrive in, and the sums over channels or tokens that threads share.
template <class Variant, class StorageType, int kTeams>
struct ColumnThread {
  using E = typename Variant::Element;
  using Shape = ChunkShape<Variant>;
  using Storage = StorageType;
  using Record = ChunkRecord<Variant>;
  static constexpr int kChunk = Shape::kChunk, kBlocks = Shape::kBlocks, kGroups = Shape::kGroups;
  static constexpr int kKeyTile = Shape::kKeyTile;
  static constexpr int kThreads = Shape::kColumnThreads, kWarps = kThreads / 32;

  ChunkCall const& p;
  Storage& s;
  Columns<E> columns;
  int const first_channel = 0;  // of those that the team has
  int const thread = index_in_team(), warp = thread / 32, lane = thread % 32;
  int const group = unsigned(thread) / Shape::kPairs, pair = unsigned(thread) % Shape::kPairs;

  /// The threads that work on one chunk; a block may have several such teams.
  KDA_DEVICE static void sync_team() { sync_named(1 + team(), kThreads); }
  KDA_DEVICE static int team() { return kTeams == 1 ? 0 : thread_index_anew() / kThreads; }
  KDA_DEVICE static int index_in_team() { return thread_index_anew() % (kTeams == 1 ? 1024 : kThreads); }

  /// Token j of this thread's eight, as given (until the scores write over it).
  KDA_DEVICE tile::Pair<E> raw_q(int j) const { return tile::load_pair<E>(&s.blocks.q.at(row(j), 2 * pair)); }
  KDA_DEVICE tile::Pair<E> raw_k(int j) const { return tile::load_pair<E>(&s.blocks.k.at(row(j), 2 * pair)); }
  /// The same, normalised.
  KDA_DEVICE float2 q(int j, tile::Pair<E> raw) const { return tile::to_float2<E>(raw) * both(s.norm[row(j)]); }
  KDA_DEVICE float2 k(int j, tile::Pair<E> raw) const {
    return tile::to_float2<E>(raw) * both(s.norm[kChunk + row(j)]);
  }
  KDA_DEVICE int row(int j) const { return group * kTokensPerThread + j; }
  KDA_DEVICE static float2 both(float x) { return {x, x}; }
  KDA_DEVICE static float2 exp2(float2 x) { return {decay_exp2<E>(x.x), decay_exp2<E>(x.y)}; }

  /// In shared memory or in the record, where a row of 64 channels is one line.
  template <class Tile>
  KDA_DEVICE void store(Tile& t, int row, float2 x) const {
    tile::store_pair<E>(&t.at(row, 2 * pair), tile::to_pair<E>(x.x, x.y));
  }
  /// log2 of the decay over the groups of tokens [first, end) of this thread's channels.
  KDA_DEVICE float2 log2_groups(int first, int end) const {
    float2 sum{0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
      if (i >= first && i < end) sum = sum + s.log2_total[i][pair];
    return sum;
  }

  /// Once for a value head.
  KDA_DEVICE void load_gate_parameters(int value_head) {
    for (int channel = thread; channel < kKeyTile; channel += kThreads) {
      ChannelGate const gate(p.gate, value_head, first_channel + channel, p.key_dim);
      s.gate_bias[channel] = gate.bias;
      if (channel == 0) s.gate_amplitude = gate.amplitude;
    }
  }
  /// The gate of the chunk, which has arrived in shared memory, into registers.
  KDA_DEVICE void load_gate(ChunkOfHead const& chunk) {
    ChannelGate const gates[2] = {{p.gate, s.gate_amplitude, s.gate_bias[2 * pair]},
                                  {p.gate, s.gate_amplitude, s.gate_bias[2 * pair + 1]}};
    if (p.g.is_fp32)
      columns.template load<float>(s.template gate<float>(), row(0), pair, chunk.rows, gates[0], gates[1]);
    else columns.template load<E>(s.template gate<E>(), row(0), pair, chunk.rows, gates[0], gates[1]);
    s.log2_total[group][pair] = columns.log2_total();
  }

  /// A quarter of the warps each for q, k and g: a thread has one address to compute, and all run the same code.
  KDA_DEVICE void load_inputs(ChunkOfHead const& chunk) {
    int const kind = warp % 4;
    if (kind < (gate_is_wide() ? 2 : 3)) {
      auto& tile = kind == 0 ? s.blocks.q : kind == 1 ? s.blocks.k : s.template gate<E>();
      Rows const& rows = kind == 0 ? p.q : kind == 1 ? p.k : p.g;
      load<E>(tile, chunk, rows, kind < 2 ? chunk.head : chunk.value_head);
    }
    cp_async_commit();
  }
  /// A gate in fp32 beside 16-bit elements takes twice the place of the others.
  KDA_DEVICE bool gate_is_wide() const { return p.g.is_fp32 && sizeof(E) < 4; }
  KDA_DEVICE void load_wide_gate(ChunkOfHead const& chunk) {
    if (warp % 4 == 2) load<float>(s.template gate<float>(), chunk, p.g, chunk.value_head);
    cp_async_commit();
  }

  /// The team's channels of q, k or g, or of their gradients.
  template <class G>
  KDA_DEVICE TileRows<G> key_rows(Rows const& rows, ChunkOfHead const& chunk, int head) const {
    return tile_rows<G>(rows, chunk, head, first_channel, p.key_dim - first_channel);
  }

  static constexpr int kLoaders = kThreads / 4;  // of one input
  static_assert(kWarps % 4 == 0);
  KDA_DEVICE int loader() const { return warp / 4 * 32 + lane; }
  template <class G, class Tile>
  KDA_DEVICE void load(Tile& tile, ChunkOfHead const& chunk, Rows const& rows, int head) {
    key_rows<G>(rows, chunk, head).template load<kKeyTile>(tile, 0, loader(), kLoaders);
  }
};

}  // namespace kda
