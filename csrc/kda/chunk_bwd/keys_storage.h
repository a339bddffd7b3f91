// The shared memory of the keys kernel, phase by phase, and what its threads have in common.
//
//   phase        blocks                        tiles / results
//   inputs       q, k, g as given              an fp32 gate beside 16-bit elements
//   states       decayed operands              dO, dX, U, S_0, dS_C of 64 columns of V
//   hand-over    decayed operands              fp32 results of products, for the threads that have the channels
//   gradients    dq, dk, dg; as fp32 dk        as fp32 dg and dq
//
// Where there is room, the gate keeps a place of its own: it is needed again at the end.
#pragma once
#include "kda/chunk/column_thread.h"
#include "kda/chunk_bwd/bring.h"
#include "kda/chunk_bwd/cell.h"
#include "kda/chunk_bwd/params.h"

namespace kda {

inline constexpr int kResultColumns = 32;  // channels of a warp's results; its rows are one block of tokens

template <class Variant>
struct KeysStorage {
  using E = typename Variant::Element;
  using Shape = ChunkShape<KeysSlice<Variant>>;
  using Wide = tile::SharedTile<E, Shape::kChunk, Shape::kKeyTile>;
  static constexpr int kChunk = Shape::kChunk, kKeyTile = Shape::kKeyTile, kBlocks = Shape::kBlocks;
  static constexpr int kGroups = Shape::kGroups, kPairs = Shape::kPairs, kWarps = Shape::kColumnThreads / 32;
  using Result = tile::SharedTile<float, kChunk, kKeyTile>;
  static constexpr bool kKeepsGate = Shape::kConfig.wgmma;

  struct Blocks {
    Wide q, k;       // rows, decayed from an anchor
    Wide k_inverse;  // columns: k, decayed to it
  } blocks;
  struct ValueTile {
    tile::SharedTile<E, kChunk, kValueTile> d_o, d_x;
    typename BackwardCell<Variant>::Values u;
    tile::MatrixTile<E, kValueTile, kKeyTile> state, d_state;
  };
  ScoreGradients<Variant> scores;
  union {
    ValueTile tile;
    Result results[2];
  };
  float2 log2_total[kGroups][kPairs];  // log2 of the decay over each eight tokens
  float2 group_sum[kGroups][kPairs];   // sums over eight tokens, of what is being summed
  union {
    struct {
      float step[kBlocks + 1][kKeyTile];  // decay from the start to the first anchor, ..., from the last to the end
      float to_end[kBlocks][kKeyTile];    // decay from each anchor to the end
    };
    float2 gate_sum[kGroups][kPairs];  // sums over eight tokens, of dg
  };
  float end_flux[kBlocks][kKeyTile];             // what columns of a block give the gate on their way to the end
  float across[kKeyTile];                        // sum over V of S_0 dS_C
  float dots[2][Shape::kWarpsPerGroup][kChunk];  // of q and dq, k and dk, partial sums over channels
  float diagonal[kChunk];                        // of scale dO U^T
  float norm[2 * kChunk];                        // 1 / |q|, then 1 / |k|
  float gate_bias[kKeyTile], gate_amplitude;
  float d_amplitude[kWarps];
  Mbarrier full;
  struct Nothing {};
  std::conditional_t<kKeepsGate, Wide, Nothing> kept_gate;

  template <class G>
  KDA_DEVICE auto& gate() {
    if constexpr (sizeof(G) > sizeof(E)) return results[0];
    else if constexpr (kKeepsGate) return kept_gate;
    else return blocks.k_inverse;
  }
  /// Where dq and dk lie before they leave.
  template <class T>
  KDA_DEVICE auto& dq() {
    if constexpr (sizeof(T) > sizeof(E)) return results[1];
    else return blocks.q;
  }
  template <class T>
  KDA_DEVICE auto& dk() {
    if constexpr (sizeof(T) > sizeof(E)) return reinterpret_cast<Result&>(blocks);
    else return blocks.k;
  }
};

/// Products that a warp has of its block of tokens: 32 channels of three results.
struct KeyResults {
  tile::Accumulator q[kResultColumns / 8], k[kResultColumns / 8], column[kResultColumns / 8];
};

}  // namespace kda
