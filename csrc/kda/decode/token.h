// Tokens as the recurrence wants them, made from what the caller gave: norms, gate, write strength.
#pragma once
#include "kda/decode/work.h"

namespace kda {

template <int kKeyTile, int kValueTile>
struct alignas(16) DecodeToken {
  float q[kKeyTile], k[kKeyTile], decay[kKeyTile];  // zero beyond key_dim
  float v[kValueTile];                              // of this block's values; zero beyond value_dim
  float beta, query_on_key;                         // q . k
};

/// An element as loaded, so that nothing waits for it before everything else is on its way too.
struct RawElement {
  uint32_t bits;

  KDA_DEVICE RawElement() : bits(0) {}
  KDA_DEVICE RawElement(void const* from, Dtype dtype, int64_t i)
      : bits(dtype == Dtype::kFloat32 ? static_cast<uint32_t const*>(from)[i] : static_cast<uint16_t const*>(from)[i]) {
  }
  KDA_DEVICE float value(Dtype dtype) const {
    if (dtype == Dtype::kFloat32) return bits_to_float(bits);
    return dtype == Dtype::kBfloat16 ? unpack2<Bf16>(bits).x : unpack2<Fp16>(bits).x;
  }
};

/// beta as the recurrence sees it.
KDA_DEVICE float write_strength(DecodeParams const& p, float beta) {
  return p.beta_sigmoid ? (p.neg_eigval ? 2.f : 1.f) * sigmoid(beta) : beta;
}

/// From q and k as given, lane l's channels l, l + 32, ..., to those of the token in shared memory, and the record of k
/// if it is wanted. All lanes of a warp.
template <int kChannels, int kKeyTile, int kValueTile>
KDA_DEVICE void finish_keys(DecodeToken<kKeyTile, kValueTile>& to, float (&q)[kChannels], float (&k)[kChannels],
                            DecodeParams const& p, DecodeWork const& work, int64_t t) {
  static_assert(kChannels * 32 == kKeyTile);
  if (p.l2norm) {
    float squares[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      squares[0] = fmaf(q[c], q[c], squares[0]), squares[1] = fmaf(k[c], k[c], squares[1]);
    float const scale = rsqrt_accurate(warp_sum_scattered(squares) + 1e-6f);  // even lanes: of q; odd ones: of k
    float const query_scale = shuffle(scale, 0), key_scale = shuffle(scale, 1);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) q[c] *= query_scale, k[c] *= key_scale;
  }
  float query_on_key = 0.f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) query_on_key = fmaf(q[c], k[c], query_on_key);
  query_on_key = warp_sum(query_on_key);
  if (lane_index() == 0) to.query_on_key = query_on_key;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) to.q[lane_index() + 32 * c] = q[c], to.k[lane_index() + 32 * c] = k[c];
  if (!p.records.k || work.first_value != 0 || work.value_head % (p.value_heads / p.heads) != 0) return;
  float* const record = p.records.k + work.record_offset(p, t, p.heads, work.head, p.key_dim);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (lane_index() + 32 * c < p.key_dim) record[lane_index() + 32 * c] = k[c];
}

/// q, k and beta of one token, loaded by one warp.
template <int kKeyTile>
struct RawKeys {
  static constexpr int kChannels = kKeyTile / 32;
  RawElement q[kChannels], k[kChannels], beta;

  /// Not `present`: nothing is loaded.
  KDA_DEVICE RawKeys(DecodeParams const& p, DecodeWork const& work, int64_t t, bool present) {
    if (!present) return;
    int64_t const at_q = work.offset(p.q_strides, t, work.head), at_k = work.offset(p.k_strides, t, work.head);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      int const c = lane_index() + 32 * i;
      if (c < p.key_dim) q[i] = RawElement(p.q, p.dtype, at_q + c), k[i] = RawElement(p.k, p.dtype, at_k + c);
    }
    if (lane_index() == 0)
      beta = RawElement(p.beta, p.beta_is_fp32 ? Dtype::kFloat32 : p.dtype,
                        work.offset(p.beta_strides, t, work.value_head));
  }
  template <int kValueTile>
  KDA_DEVICE void finish(DecodeToken<kKeyTile, kValueTile>& to, DecodeParams const& p, DecodeWork const& work,
                         int64_t t) const {
    float x[kChannels], y[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = q[i].value(p.dtype), y[i] = k[i].value(p.dtype);
    if (lane_index() == 0) to.beta = write_strength(p, beta.value(p.beta_is_fp32 ? Dtype::kFloat32 : p.dtype));
    finish_keys(to, x, y, p, work, t);
  }
};

/// `count` elements of each of up to kStagedTokens tokens, spread over the threads of a block: thread i has element
/// i % count of tokens i / count, ... (count <= threads), or elements i, i + threads, ... of every token.
template <int kThreads, int kCount>
struct TokenElements {
  static constexpr int kTokensAtOnce = kThreads > kCount ? kThreads / kCount : 1;
  static constexpr int kElements = kCount > kThreads ? kCount / kThreads : 1;
  static constexpr int kTokens = (kStagedTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static_assert(kThreads % kCount == 0 || kCount % kThreads == 0);
  RawElement raw[kTokens][kElements];

  KDA_DEVICE static int element(int e) { return thread_index() % kCount + e * kThreads; }
  KDA_DEVICE static int token(int i) { return i * kTokensAtOnce + thread_index() / kCount; }

  /// Of `tokens` tokens from `first` on, `strides` apart; elements from `dim` on are zero.
  KDA_DEVICE TokenElements(void const* from, Dtype dtype, int64_t at, int64_t token_stride, int tokens, int dim) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i * kTokensAtOnce >= tokens) break;
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (token(i) < tokens && element(e) < dim)
          raw[i][e] = RawElement(from, dtype, at + token(i) * token_stride + element(e));
    }
  }
  /// store(token, element, value) for each.
  template <class F>
  KDA_DEVICE void finish(Dtype dtype, int tokens, F store) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i * kTokensAtOnce >= tokens) break;
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (token(i) < tokens) store(token(i), element(e), raw[i][e].value(dtype));
    }
  }
};

/// Tokens first, first + 1, ... of the sequence. All threads: of q, k and beta each warp prepares a token, of the
/// decays and v each thread an element; all that comes from global memory is on its way before any of it is used.
template <class Shape, int kKeyTile, int kValueTile>
KDA_DEVICE void prepare_tokens(DecodeToken<kKeyTile, kValueTile>* to, DecodeParams const& p, DecodeWork const& work,
                               int64_t first, int count) {
  using Channels = TokenElements<Shape::kThreads, kKeyTile>;
  int const warp = thread_index() / 32;
  Dtype const gate_dtype = p.g_is_fp32 ? Dtype::kFloat32 : p.dtype;
  Channels const g(p.g, gate_dtype, work.offset(p.g_strides, first, work.value_head), p.g_strides.token, count,
                   p.key_dim);
  TokenElements<Shape::kThreads, kValueTile> const v(
      p.v, p.dtype, work.offset(p.v_strides, first, work.value_head) + work.first_value, p.v_strides.token, count,
      p.value_dim - work.first_value);
  RawKeys<kKeyTile> keys(p, work, first + warp, warp < count);
  g.finish(gate_dtype, count, [&](int t, int c, float x) { to[t].decay[c] = x; });
  v.finish(p.dtype, count, [&](int t, int i, float x) { to[t].v[i] = x; });
#pragma unroll 1
  for (int i = warp; i < count; i += Shape::kWarps) {
    RawKeys<kKeyTile> const next(p, work, first + i + Shape::kWarps, i + Shape::kWarps < count);
    keys.finish(to[i], p, work, first + i);
    keys = next;
  }
  bool const records = p.records.g && work.first_value == 0;
#pragma unroll
  for (int e = 0; e < Channels::kElements; ++e) {
    int const c = Channels::element(e);
    ChannelGate const gate(p.gate, work.value_head, c, p.key_dim);
#pragma unroll 1
    for (int t = Channels::token(0); t < count; t += Channels::kTokensAtOnce) {
      float const log_decay = gate.log_decay(to[t].decay[c]);  // of this thread's own making
      to[t].decay[c] = exp_accurate(log_decay);
      if (records && c < p.key_dim)
        p.records.g[work.record_offset(p, first + t, p.value_heads, work.value_head, p.key_dim) + c] = log_decay;
    }
  }
}

/// Token t of the sequence from its records: k, decay, and u in place of v. All lanes of a warp.
template <int kKeyTile, int kValueTile>
KDA_DEVICE void load_records(DecodeToken<kKeyTile, kValueTile>& to, DecodeCommitParams const& p, DecodeWork const& work,
                             int64_t t) {
  float const* const k = p.records.k + work.record_offset(p, t, p.heads, work.head, p.key_dim);
  float const* const g = p.records.g + work.record_offset(p, t, p.value_heads, work.value_head, p.key_dim);
  float const* const u =
      p.records.u + work.record_offset(p, t, p.value_heads, work.value_head, p.value_dim) + work.first_value;
#pragma unroll
  for (int c = lane_index(); c < kKeyTile; c += 32) {
    to.k[c] = c < p.key_dim ? k[c] : 0.f;
    to.decay[c] = c < p.key_dim ? exp_accurate(g[c]) : 1.f;
  }
  for (int i = lane_index(); i < kValueTile; i += 32) to.v[i] = work.first_value + i < p.value_dim ? u[i] : 0.f;
}

}  // namespace kda
