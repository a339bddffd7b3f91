// Which gradients a call of the backward wants, and what follows from it.
#pragma once
#include <cstdint>

namespace kda {

/// A set of gradients: a bit for each, in the order of the op's arguments.
struct Wanted {
  enum Gradient : int64_t { kQ = 1, kK = 2, kV = 4, kG = 8, kBeta = 16, kALog = 32, kDtBias = 64, kInitialState = 128 };
  static constexpr int64_t kSums = kALog | kDtBias;           // over tokens
  static constexpr int64_t kOfKeys = kQ | kK | kG | kSums;    // need the keys kernel
  static constexpr int64_t kOfTokens = kOfKeys | kV | kBeta;  // all but that of the initial state: need dX

  int64_t bits;

  bool any(int64_t of) const { return bits & of; }
  void drop_unless(bool given, Gradient gradient) {
    if (!given) bits &= ~int64_t(gradient);
  }
};

/// Of a call, what decides what memory it needs.
struct ChunkBwdSizes {
  int key_dim, value_dim, chunk, element_bytes;
  bool grouped;  // heads of q and k have several value heads each
};

/// What the op allocates beside gradients and workspace: tensors of tokens of value heads.
struct ChunkBwdScratch {
  bool dx;      // dX, in Element, where dv is not wanted: else it lies there
  bool dq, dk;  // in fp32, for each value head of grouped heads
  bool w;       // W, in Element, where dk is not wanted: else it lies there
  bool l;       // L, in Element, where dq is not wanted or its rows are too short: else it lies there

  ChunkBwdScratch(Wanted wanted, ChunkBwdSizes const& sizes)
      : dx(wanted.any(Wanted::kOfTokens) && !wanted.any(Wanted::kV)),
        dq(sizes.grouped && wanted.any(Wanted::kQ)),
        dk(sizes.grouped && wanted.any(Wanted::kK)),
        w(wanted.bits && !wanted.any(Wanted::kK)),
        l(wanted.any(Wanted::kOfTokens) && !(wanted.any(Wanted::kQ) && has_room(sizes))) {}

  /// `rows`: tokens of value heads.
  int64_t bytes(int64_t rows, ChunkBwdSizes const& x) const {
    int64_t const elements = int64_t(dx) * x.value_dim + int64_t(w) * x.key_dim + int64_t(l) * x.chunk;
    return rows * (elements * x.element_bytes + (int64_t(dq) + dk) * x.key_dim * int64_t(sizeof(float)));
  }

 private:
  /// A row of dq, for one of L.
  static bool has_room(ChunkBwdSizes const& x) {
    return x.chunk * x.element_bytes <= x.key_dim * (x.grouped ? int(sizeof(float)) : x.element_bytes);
  }
};

}  // namespace kda
