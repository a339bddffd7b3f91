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

/// What the op allocates beside gradients and workspace.
struct ChunkBwdScratch {
  bool dx;      // dX, in Element, where dv is not wanted: else it lies there
  bool dq, dk;  // in fp32, for each value head of grouped heads

  ChunkBwdScratch(Wanted wanted, bool grouped)
      : dx(wanted.any(Wanted::kOfTokens) && !wanted.any(Wanted::kV)),
        dq(grouped && wanted.any(Wanted::kQ)),
        dk(grouped && wanted.any(Wanted::kK)) {}

  /// `rows`: tokens of value heads.
  int64_t bytes(int64_t rows, int key_dim, int value_dim, int element_bytes) const {
    return rows * (int64_t(dx) * value_dim * element_bytes + (int64_t(dq) + dk) * key_dim * int64_t(sizeof(float)));
  }
};

}  // namespace kda
