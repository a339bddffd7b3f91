// A block's slice of a state in registers, in either layout: how it is loaded, decayed, projected, corrected, stored.
#pragma once
#include "kda/decode/config.h"

namespace kda {

/// 16 bytes of state, at most `count` elements of it.
template <class State, bool kVector>
KDA_DEVICE uint4 load_piece(State const* from, int count) {
  if constexpr (kVector) return count > 0 ? *reinterpret_cast<uint4 const*>(from) : uint4{};
  constexpr int kPerWord = 4 / sizeof(State);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kPerWord == 1) {
      word[i] = i < count ? float_to_bits(from[i]) : 0u;
    } else {
      uint32_t const low = 2 * i < count ? from[2 * i].bits : 0u, high = 2 * i + 1 < count ? from[2 * i + 1].bits : 0u;
      word[i] = low + (high << 16);  // a sum: with | ptxas has more loads on their way than registers for them
    }
  }
  return {word[0], word[1], word[2], word[3]};
}
/// 16 bytes of a state of E.
template <class E, int kElements>
KDA_DEVICE uint4 pack_piece(float const (&x)[kElements]) {
  if constexpr (sizeof(E) == 4)
    return {float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])};
  else return {pack2<E>(x[0], x[1]), pack2<E>(x[2], x[3]), pack2<E>(x[4], x[5]), pack2<E>(x[6], x[7])};
}
/// At most `count` elements of E, one by one.
template <class E, class State, int kElements>
KDA_DEVICE void store_elements(State* to, float const (&x)[kElements], int count) {
#pragma unroll
  for (int j = 0; j < kElements; ++j)
    if (j < count) {
      if constexpr (sizeof(State) == 4) to[j] = x[j];
      else to[j].bits = uint16_t(pack2<E>(x[j], 0.f));
    }
}

/// kCount neighbours in shared memory, 16-byte aligned.
template <int kCount>
KDA_DEVICE void load_floats(float (&x)[kCount], float const* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float4 const four = *reinterpret_cast<float4 const*>(from + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

/// Pieces between global memory and registers. `Derived` says where piece i lies and how much of it exists.
template <class Shape, class Derived>
struct StatePieces {
  using State = typename Shape::State;
  static constexpr int kElements = Shape::kElements, kPieces = Shape::kPieces;
  float x[kPieces][kElements];  // between fetch and finish_fetch, the 16 bytes of a piece in its first four
  Dtype const& type;            // in the parameters, which can be read again: no register is kept for it

  KDA_DEVICE explicit StatePieces(DecodeParams const& p) : type(p.state_dtype) {}

  /// Starts the loads: a warp stalls at the first use of what they bring, so that comes after everything else is on
  /// its way too, in finish_fetch. `from`: the state of this head; null: zero.
  KDA_DEVICE void fetch(State const* from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      uint4 const piece = load_piece<State, Shape::kVector>(from + self().offset(i), from ? self().present(i) : 0);
      x[i][0] = bits_to_float(piece.x), x[i][1] = bits_to_float(piece.y);
      x[i][2] = bits_to_float(piece.z), x[i][3] = bits_to_float(piece.w);
    }
  }
  KDA_DEVICE void finish_fetch() {
    if constexpr (sizeof(State) == 2) {
      if (type == Dtype::kBfloat16) widen<Bf16>();
      else widen<Fp16>();
    }
  }
  /// One branch for all pieces, not one for each.
  KDA_DEVICE void store(State* to) const {
    if constexpr (sizeof(State) == 4) store_as<float>(to);
    else if (type == Dtype::kBfloat16) store_as<Bf16>(to);
    else store_as<Fp16>(to);
  }

 private:
  template <class E>
  KDA_DEVICE void widen() {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        float2 const pair = unpack2<E>(float_to_bits(x[i][j]));
        x[i][2 * j] = pair.x, x[i][2 * j + 1] = pair.y;
      }
  }
  /// All pieces are ready before the first is stored, so that no branch is needed where rows end.
  template <class E>
  KDA_DEVICE void store_as(State* to) const {
    if constexpr (Shape::kVector) {
      uint4 piece[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) piece[i] = pack_piece<E>(x[i]);
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (self().present(i) > 0) *reinterpret_cast<uint4*>(to + self().offset(i)) = piece[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) store_elements<E>(to + self().offset(i), x[i], self().present(i));
    }
  }
  KDA_DEVICE Derived const& self() const { return static_cast<Derived const&>(*this); }
};

/// Rows of K across lanes. Values are named by their index in the tile.
template <class Shape>
struct ValueFirstTile : StatePieces<Shape, ValueFirstTile<Shape>> {
  static constexpr int kElements = Shape::kElements, kLanesPerRow = Shape::kLanesPerRow, kRows = Shape::kRows;
  static constexpr int kRowPieces = Shape::kPiecesPerRow;
  static constexpr int kOwn = 1;          // values whose sums this thread knows
  static constexpr int kUpdates = kRows;  // values that this thread updates
  struct Exchange {};
  using StatePieces<Shape, ValueFirstTile<Shape>>::x;
  int first_value, key_dim, value_dim;
  float on_key, on_query;

  KDA_DEVICE ValueFirstTile(DecodeParams const& p, int first)
      : StatePieces<Shape, ValueFirstTile<Shape>>(p), first_value(first), key_dim(p.key_dim), value_dim(p.value_dim) {}

  KDA_DEVICE static int key(int piece) { return (piece * kLanesPerRow + lane_index() % kLanesPerRow) * kElements; }
  KDA_DEVICE static int row(int r) {
    return thread_index() / 32 * Shape::kRowsPerWarp + r * Shape::kRowsAtOnce + lane_index() / kLanesPerRow;
  }
  KDA_DEVICE int offset(int i) const {
    int const width = Shape::kVector ? Shape::kKeyTile : key_dim;
    return (first_value + row(i / kRowPieces)) * width + key(i % kRowPieces);
  }
  KDA_DEVICE int present(int i) const {
    if (first_value + row(i / kRowPieces) >= value_dim) return 0;
    return Shape::kVector ? kElements : key_dim - key(i % kRowPieces);
  }
  KDA_DEVICE static int own(int) { return row(lane_index() % kRows); }
  KDA_DEVICE static bool writes_output() { return lane_index() % kLanesPerRow < kRows; }

  /// S <- Diag(decay) S
  KDA_DEVICE void decay(float const* decay) {
#pragma unroll
    for (int piece = 0; piece < kRowPieces; ++piece) {
      float d[kElements];
      load_floats(d, decay + key(piece));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kElements; ++j) x[r * kRowPieces + piece][j] *= d[j];
    }
  }

  /// S^T k and S^T q of this thread's own value.
  KDA_DEVICE void project(float const* k, float const* q, Exchange&) {
    float sums[2 * kRows];
#pragma unroll
    for (int r = 0; r < 2 * kRows; ++r) sums[r] = 0.f;
#pragma unroll
    for (int piece = 0; piece < kRowPieces; ++piece) {
      float keys[kElements], queries[kElements];
      load_floats(keys, k + key(piece)), load_floats(queries, q + key(piece));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          sums[r] = fmaf(x[r * kRowPieces + piece][j], keys[j], sums[r]);
          sums[kRows + r] = fmaf(x[r * kRowPieces + piece][j], queries[j], sums[kRows + r]);
        }
    }
    sum_rows(sums);
  }
  KDA_DEVICE void key_sums(float (&sum)[1], Exchange const&) const { sum[0] = on_key; }
  KDA_DEVICE void query_sums(float (&sum)[1], Exchange const&) const { sum[0] = on_query; }

  /// S <- S + k u^T
  KDA_DEVICE void add(float const* k, float const (&u)[kRows]) {
#pragma unroll
    for (int piece = 0; piece < kRowPieces; ++piece) {
      float keys[kElements];
      load_floats(keys, k + key(piece));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kElements; ++j)
          x[r * kRowPieces + piece][j] = fmaf(keys[j], u[r], x[r * kRowPieces + piece][j]);
    }
  }

  /// u of the rows that this thread updates: from the lanes that know them, or from shared memory.
  KDA_DEVICE void spread(float (&u)[kRows], float const (&own)[1]) const {
    int const group = lane_index() / kLanesPerRow * kLanesPerRow;
#pragma unroll
    for (int r = 0; r < kRows; ++r) u[r] = shuffle(own[0], group + r);
  }
  KDA_DEVICE void read_updates(float (&u)[kRows], float const* of_tile) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) u[r] = of_tile[row(r)];
  }

 private:
  /// Over the lanes of a row; lane l gets both sums of row l % kRows.
  KDA_DEVICE void sum_rows(float (&sums)[2 * kRows]) {
    static_assert(2 * kRows <= kLanesPerRow);
    float mine = group_sum_scattered(sums);
#pragma unroll
    for (int bits = 2 * kRows; bits < kLanesPerRow; bits *= 2) mine += shuffle_xor(mine, bits);
    float const other = shuffle_xor(mine, kRows);
    bool const has_query = lane_index() & kRows;
    on_key = has_query ? other : mine, on_query = has_query ? mine : other;
  }
};

/// Rows of V across lanes, K across lanes' groups and warps.
template <class Shape>
struct KeyFirstTile : StatePieces<Shape, KeyFirstTile<Shape>> {
  static constexpr int kElements = Shape::kElements, kRows = Shape::kRows;
  static constexpr int kOwn = kElements, kUpdates = kElements;
  struct Exchange {  // partial sums of the warps
    float on_key[Shape::kWarps][Shape::kValueTile];
    float on_query[Shape::kWarps][Shape::kValueTile];
  };
  using StatePieces<Shape, KeyFirstTile<Shape>>::x;
  int first_value, key_dim, value_dim;

  KDA_DEVICE KeyFirstTile(DecodeParams const& p, int first)
      : StatePieces<Shape, KeyFirstTile<Shape>>(p), first_value(first), key_dim(p.key_dim), value_dim(p.value_dim) {}

  KDA_DEVICE static int key(int i) { return thread_index() / Shape::kLanesPerRow * kRows + i; }
  KDA_DEVICE static int column() { return lane_index() % Shape::kLanesPerRow * kElements; }
  KDA_DEVICE int offset(int i) const { return key(i) * value_dim + first_value + column(); }
  KDA_DEVICE int present(int i) const { return key(i) < key_dim ? value_dim - first_value - column() : 0; }
  KDA_DEVICE static int own(int j) { return column() + j; }
  KDA_DEVICE static bool writes_output() { return thread_index() < Shape::kLanesPerRow; }

  /// S <- Diag(decay) S
  KDA_DEVICE void decay(float const* decay) {
    float d[kRows];
    load_floats(d, decay + key(0));
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kElements; ++j) x[i][j] *= d[i];
  }

  /// This warp's share of S^T k and S^T q. One barrier.
  KDA_DEVICE void project(float const* k, float const* q, Exchange& exchange) const {
    int const warp = thread_index() / 32;
    sum_keys(k, exchange.on_key[warp]);
    sum_keys(q, exchange.on_query[warp]);
    sync_block();
  }
  KDA_DEVICE static void key_sums(float (&sum)[kElements], Exchange const& e) { sum_warps(sum, e.on_key); }
  KDA_DEVICE static void query_sums(float (&sum)[kElements], Exchange const& e) { sum_warps(sum, e.on_query); }

  /// S <- S + k u^T
  KDA_DEVICE void add(float const* k, float const (&u)[kElements]) {
    float keys[kRows];
    load_floats(keys, k + key(0));
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kElements; ++j) x[i][j] = fmaf(keys[i], u[j], x[i][j]);
  }

  KDA_DEVICE void spread(float (&u)[kElements], float const (&own)[kElements]) const {
#pragma unroll
    for (int j = 0; j < kElements; ++j) u[j] = own[j];
  }
  KDA_DEVICE void read_updates(float (&u)[kElements], float const* of_tile) const {
    load_floats(u, of_tile + column());
  }

 private:
  /// S^T row over the keys of this warp.
  KDA_DEVICE void sum_keys(float const* row, float* of_warp) const {
    float own[kRows], sums[kElements];
    load_floats(own, row + key(0));
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      sums[j] = 0.f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[j] = fmaf(x[i][j], own[i], sums[j]);
    }
    sum_groups<Shape::kLanesPerRow>(sums, of_warp + column());
  }
  /// Over the groups of lanes that share these columns: lanes that have kBit set keep the upper half of them.
  template <int kBit, int kCount>
  KDA_DEVICE static void sum_groups(float const (&sums)[kCount], float* to) {
    if constexpr (kBit < 32) {
      constexpr int kHalf = kCount / 2;
      bool const upper = lane_index() & kBit;
      float half[kHalf];
#pragma unroll
      for (int j = 0; j < kHalf; ++j)
        half[j] = (upper ? sums[kHalf + j] : sums[j]) + shuffle_xor(upper ? sums[j] : sums[kHalf + j], kBit);
      sum_groups<2 * kBit>(half, to + (upper ? kHalf : 0));
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = sums[j];
    }
  }
  KDA_DEVICE static void sum_warps(float (&sum)[kElements], float const (&partial)[Shape::kWarps][Shape::kValueTile]) {
#pragma unroll 4
    for (int w = 0; w < Shape::kWarps; ++w) {
      float x[kElements];
      load_floats(x, partial[w] + column());
#pragma unroll
      for (int j = 0; j < kElements; ++j) sum[j] = w ? sum[j] + x[j] : x[j];
    }
  }
};

template <class Shape>
using StateTile = std::conditional_t<Shape::kValueFirst, ValueFirstTile<Shape>, KeyFirstTile<Shape>>;

}  // namespace kda
