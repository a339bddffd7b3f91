// A thread of the prepare kernel: the norms of q and k, and which way the scores go.
#pragma once
#include "kda/chunk/prepare_storage.h"

namespace kda {

/// Decays over eight tokens down to 2^-kGentle leave room in the exponent (bf16) or in the mantissa of sums of logs
/// (fp32) on both sides; fp16 has little of the first.
template <class E>
inline constexpr float kGentle = std::is_same_v<E, Bf16>   ? 64.f
                                 : std::is_same_v<E, Fp16> ? 6.f
                                                           : 8.f;
/// Largest |q| and |k| that may be multiplied by 2^kGentle.
template <class E>
inline constexpr float kLargestKey = std::is_same_v<E, Fp16> ? 512.f : 1e12f;

/// With kTeams teams in a block.
template <class Variant, int kTeams>
struct PrepareThread : ColumnThread<Variant, PrepareStorage<Variant>, kTeams> {
  using Base = ColumnThread<Variant, PrepareStorage<Variant>, kTeams>;
  using Base::columns, Base::kChunk, Base::kKeyTile, Base::kWarps, Base::lane, Base::p, Base::s, Base::warp;
  using typename Base::E;
  using DiagonalElement = std::conditional_t<sizeof(E) == 4, float, tile::Tf32>;  // of inverses
  ChunkRecordAt<Variant> out;

  /// 1 / |q| and 1 / |k| of every token, and whether the gate of any thread or the size of any row is too much for
  /// BlockScores. A few lanes share a row, a piece of 16 bytes each at a time.
  KDA_DEVICE void normalise() {
    constexpr int kPiece = Base::Storage::Wide::kPiece, kPieces = kKeyTile / kPiece;
    constexpr int kLanes = kPieces < 32 ? kPieces : 32, kRows = kWarps * (32 / kLanes), kTurns = 2 * kChunk / kRows;
    static_assert(kTurns * kRows == 2 * kChunk && kChunk % kRows == 0);
    int const row0 = warp * (32 / kLanes) + lane / kLanes;
    float squares[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      auto const& tile = i * kRows < kChunk ? s.blocks.q : s.blocks.k;
      squares[i] = 0.f;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kLanes)
        add_squares(squares[i], &tile.at(i * kRows % kChunk + row0, (piece + lane % kLanes) * kPiece));
    }
    float square = group_sum_scattered(squares);
#pragma unroll
    for (int bits = kTurns; bits < kLanes; bits *= 2) square += shuffle_xor(square, bits);
    bool steep = is_steep(columns.log2_total());
    if (lane % kLanes < kTurns) {
      int const turn = lane % kLanes, row = turn * kRows + row0;  // of q, then of k
      s.norm[row] = p.l2norm ? rsqrt_accurate(square + 1e-6f) : 1.f;
      steep = steep || (!p.l2norm && !(square <= kLargestKey<E> * kLargestKey<E>));
    }
    bool const any = warp_any(steep);
    if (lane == 0) s.steep[warp] = any;
    Base::sync_team();
  }

  KDA_DEVICE bool any_steep() const {
    bool steep = false;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) steep = steep || s.steep[i];
    return steep;
  }

 private:
  KDA_DEVICE static void add_squares(float& sum, E const* piece) {
    uint4 const bits = *reinterpret_cast<uint4 const*>(piece);
    uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(E) == 4) {
        sum += bits_to_float(words[i]) * bits_to_float(words[i]);
      } else {
        float2 const x = unpack2<E>(words[i]);
        sum += x.x * x.x, sum += x.y * x.y;
      }
    }
  }
  KDA_DEVICE static bool is_steep(float2 log2_total) {  // also where it is nan
    return !(log2_total.x >= -kGentle<E> && log2_total.y >= -kGentle<E>);
  }
};

}  // namespace kda
