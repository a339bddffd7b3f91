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

/// What only the parameters know of a tensor's elements. Bits as loaded become a number late, so that nothing waits for
/// them before everything else is on its way too; by selection, which is shorter than a branch.
struct ElementFormat {
  bool is_fp32, is_bf16;

  KDA_DEVICE ElementFormat(Dtype dtype, bool fp32 = false)
      : is_fp32(fp32 || dtype == Dtype::kFloat32), is_bf16(dtype == Dtype::kBfloat16) {}
  KDA_DEVICE float value(uint32_t bits) const {
    float const half = unpack2<Fp16>(bits).x;
    uint32_t const narrow = is_bf16 ? bits << 16 : float_to_bits(half);
    return bits_to_float(is_fp32 ? bits : narrow);
  }
  /// f(from, as an array of words of that size): the one place that branches.
  template <class F>
  KDA_DEVICE void with_words(void const* from, F f) const {
    if (is_fp32) f(static_cast<uint32_t const*>(from));
    else f(static_cast<uint16_t const*>(from));
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
  uint32_t q[kChannels], k[kChannels], beta;

  /// Not `present`: nothing is loaded.
  KDA_DEVICE RawKeys(DecodeParams const& p, DecodeWork const& work, int64_t t, bool present) {
    if (!present) return;
    ElementFormat const streams(p.dtype), betas(p.dtype, p.beta_is_fp32);
    streams.with_words(p.q, [&](auto const* x) { load(q, x + work.offset(p.q_strides, t, work.head), p.key_dim); });
    streams.with_words(p.k, [&](auto const* x) { load(k, x + work.offset(p.k_strides, t, work.head), p.key_dim); });
    betas.with_words(p.beta, [&](auto const* x) { beta = x[work.offset(p.beta_strides, t, work.value_head)]; });
  }
  template <int kValueTile>
  KDA_DEVICE void finish(DecodeToken<kKeyTile, kValueTile>& to, DecodeParams const& p, DecodeWork const& work,
                         int64_t t) const {
    ElementFormat const streams(p.dtype), betas(p.dtype, p.beta_is_fp32);
    float x[kChannels], y[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = streams.value(q[i]), y[i] = streams.value(k[i]);
    if (lane_index() == 0) to.beta = write_strength(p, betas.value(beta));
    finish_keys(to, x, y, p, work, t);
  }

 private:
  template <class Word>
  KDA_DEVICE static void load(uint32_t (&bits)[kChannels], Word const* from, int dim) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) bits[i] = lane_index() + 32 * i < dim ? from[lane_index() + 32 * i] : 0u;
  }
};

/// kCount elements of each of up to kStagedTokens tokens, spread over the threads of a block: thread i has element
/// i % kCount of tokens i / kCount, ... (kCount <= threads), or elements i, i + threads, ... of every token.
template <int kThreads, int kCount>
struct TokenElements {
  static constexpr int kTokensAtOnce = kThreads > kCount ? kThreads / kCount : 1;
  static constexpr int kElements = kCount > kThreads ? kCount / kThreads : 1;
  static constexpr int kTokens = (kStagedTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static_assert(kThreads % kCount == 0 || kCount % kThreads == 0);
  ElementFormat format;
  uint32_t bits[kTokens][kElements];

  KDA_DEVICE static int element(int e) { return thread_index() % kCount + e * kThreads; }
  KDA_DEVICE static int token(int i) { return i * kTokensAtOnce + thread_index() / kCount; }

  /// Of `tokens` tokens, the i-th at element at + of(i) stride; elements from `dim` on are zero.
  template <class Which>
  KDA_DEVICE TokenElements(ElementFormat f, void const* from, int64_t at, int64_t stride, Which const& of, int tokens,
                           int dim)
      : format(f) {
    format.with_words(from, [&](auto const* words) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (i * kTokensAtOnce >= tokens) break;
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          bits[i][e] = token(i) < tokens && element(e) < dim ? words[at + of(token(i)) * stride + element(e)] : 0u;
      }
    });
  }
  /// store(token, element, value) for each.
  template <class F>
  KDA_DEVICE void finish(int tokens, F store) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i * kTokensAtOnce >= tokens) break;
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (token(i) < tokens) store(token(i), element(e), format.value(bits[i][e]));
    }
  }
};

/// Which tokens are prepared together: neighbours, or some that lie anywhere.
struct Neighbours {
  KDA_DEVICE int operator()(int i) const { return i; }
};
struct Scattered {
  int64_t const* tokens;
  int count;
  KDA_DEVICE int64_t operator()(int i) const { return i < count ? tokens[i] : 0; }
};

/// Tokens first + of(0), first + of(1), ... of the sequence. All threads: of q, k and beta each warp prepares a token,
/// of the decays and v each thread an element; all that comes from global memory is on its way before any of it is
/// used.
template <class Shape, int kKeyTile, int kValueTile, class Which>
KDA_DEVICE void prepare_tokens(DecodeToken<kKeyTile, kValueTile>* to, DecodeParams const& p, DecodeWork const& work,
                               int64_t first, Which const& of, int count) {
  using Channels = TokenElements<Shape::kThreads, kKeyTile>;
  int const warp = thread_index() / 32;
  Channels const g(ElementFormat(p.dtype, p.g_is_fp32), p.g, work.offset(p.g_strides, first, work.value_head),
                   p.g_strides.token, of, count, p.key_dim);
  TokenElements<Shape::kThreads, kValueTile> const v(
      ElementFormat(p.dtype), p.v, work.offset(p.v_strides, first, work.value_head) + work.first_value,
      p.v_strides.token, of, count, p.value_dim - work.first_value);
  bool const gated = p.gate.kind != GateKind::kLogDecay;
  float const A_log = gated && p.gate.A_log ? p.gate.A_log[work.value_head] : 0.f;
  float bias[Channels::kElements];
#pragma unroll
  for (int e = 0; e < Channels::kElements; ++e) {
    bool const has_bias = gated && p.gate.dt_bias && Channels::element(e) < p.key_dim;
    bias[e] = has_bias ? p.gate.dt_bias[work.value_head * p.key_dim + Channels::element(e)] : 0.f;
  }
  RawKeys<kKeyTile> const keys(p, work, first + of(warp), warp < count);
  g.finish(count, [&](int t, int c, float x) { to[t].decay[c] = x; });
  v.finish(count, [&](int t, int i, float x) { to[t].v[i] = x; });
  if (warp < count) keys.finish(to[warp], p, work, first + of(warp));
  if constexpr (Shape::kWarps < kStagedTokens)
    for (int i = warp + Shape::kWarps; i < count; i += Shape::kWarps)
      RawKeys<kKeyTile>(p, work, first + of(i), true).finish(to[i], p, work, first + of(i));
  bool const records = p.records.g && work.first_value == 0;
#pragma unroll
  for (int e = 0; e < Channels::kElements; ++e) {
    int const c = Channels::element(e);
    ChannelGate const gate(p.gate, exp_accurate(A_log), bias[e]);
#pragma unroll 1
    for (int t = Channels::token(0); t < count; t += Channels::kTokensAtOnce) {
      float const log_decay = gate.log_decay(to[t].decay[c]);  // of this thread's own making
      to[t].decay[c] = exp_accurate(log_decay);
      if (records && c < p.key_dim)
        p.records.g[work.record_offset(p, first + of(t), p.value_heads, work.value_head, p.key_dim) + c] = log_decay;
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
