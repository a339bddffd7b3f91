// One token as the recurrence wants it, made by one warp from what the caller gave: norms, gate, write strength.
#pragma once
#include "kda/decode/work.h"

namespace kda {

template <int kKeyTile, int kValueTile>
struct alignas(16) DecodeToken {
  float q[kKeyTile], k[kKeyTile], decay[kKeyTile];  // zero beyond key_dim
  float v[kValueTile];                              // of this block's values; zero beyond value_dim
  float beta, query_on_key;                         // q . k
};

/// A row as loaded, lane l's channels l, l + 32, ...: nothing looks at it before all rows of a token are on their way.
template <int kChannels>
struct RawRow {
  uint32_t bits[kChannels];
  Dtype dtype;

  KDA_DEVICE RawRow(void const* row, int64_t offset, Dtype type, int dim) : dtype(type) {
    if (dtype == Dtype::kFloat32) load(static_cast<uint32_t const*>(row) + offset, dim);
    else load(static_cast<uint16_t const*>(row) + offset, dim);
  }
  KDA_DEVICE float operator[](int c) const {
    if (dtype == Dtype::kFloat32) return bits_to_float(bits[c]);
    return dtype == Dtype::kBfloat16 ? unpack2<Bf16>(bits[c]).x : unpack2<Fp16>(bits[c]).x;
  }

 private:
  template <class T>
  KDA_DEVICE void load(T const* from, int dim) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) bits[c] = lane_index() + 32 * c < dim ? from[lane_index() + 32 * c] : 0u;
  }
};

/// Lane l has channels l, l + 32, ...
template <int kChannels>
struct TokenChannels {
  float q[kChannels], k[kChannels], g[kChannels];
};

/// beta as the recurrence sees it.
KDA_DEVICE float write_strength(DecodeParams const& p, float beta) {
  return p.beta_sigmoid ? (p.neg_eigval ? 2.f : 1.f) * sigmoid(beta) : beta;
}

/// From the channels as given to the token in shared memory, and its records if they are wanted. All lanes of a warp.
template <int kChannels, int kKeyTile, int kValueTile>
KDA_DEVICE void finish_token(DecodeToken<kKeyTile, kValueTile>& to, TokenChannels<kChannels>& x, DecodeParams const& p,
                             DecodeWork const& work, int64_t t) {
  static_assert(kChannels * 32 == kKeyTile);
  float query_square = 0.f, key_square = 0.f, query_on_key = 0.f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    query_square = fmaf(x.q[c], x.q[c], query_square);
    key_square = fmaf(x.k[c], x.k[c], key_square);
  }
  if (p.l2norm) {
    float const query_scale = rsqrt_accurate(warp_sum(query_square) + 1e-6f);
    float const key_scale = rsqrt_accurate(warp_sum(key_square) + 1e-6f);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x.q[c] *= query_scale, x.k[c] *= key_scale;
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) query_on_key = fmaf(x.q[c], x.k[c], query_on_key);
  query_on_key = warp_sum(query_on_key);
  bool const records = p.records.k && work.first_value == 0;
  bool const records_key = records && work.value_head % (p.value_heads / p.heads) == 0;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    int const channel = lane_index() + 32 * c;
    to.q[channel] = x.q[c], to.k[channel] = x.k[c], to.decay[channel] = x.g[c];
    if (records_key && channel < p.key_dim)
      p.records.k[work.record_offset(p, t, p.heads, work.head, p.key_dim) + channel] = x.k[c];
  }
#pragma unroll 4  // of every lane's own channels again, so that eight gates are not in registers at once
  for (int c = 0; c < kChannels; ++c) {
    int const channel = lane_index() + 32 * c;
    float const g = ChannelGate(p.gate, work.value_head, channel, p.key_dim).log_decay(to.decay[channel]);
    to.decay[channel] = exp_accurate(g);
    if (records && channel < p.key_dim)
      p.records.g[work.record_offset(p, t, p.value_heads, work.value_head, p.key_dim) + channel] = g;
  }
  if (lane_index() == 0) to.query_on_key = query_on_key;
}

/// Token t of the sequence. All lanes of a warp.
template <int kKeyTile, int kValueTile>
KDA_DEVICE void prepare_token(DecodeToken<kKeyTile, kValueTile>& to, DecodeParams const& p, DecodeWork const& work,
                              int64_t t) {
  constexpr int kChannels = kKeyTile / 32;
  RawRow<kChannels> const q(p.q, work.offset(p.q_strides, t, work.head), p.dtype, p.key_dim);
  RawRow<kChannels> const k(p.k, work.offset(p.k_strides, t, work.head), p.dtype, p.key_dim);
  RawRow<kChannels> const g(p.g, work.offset(p.g_strides, t, work.value_head), p.g_is_fp32 ? Dtype::kFloat32 : p.dtype,
                            p.key_dim);
  TokenChannels<kChannels> x;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) x.q[c] = q[c], x.k[c] = k[c], x.g[c] = g[c];
  int64_t const v = work.offset(p.v_strides, t, work.value_head) + work.first_value;
  for (int i = lane_index(); i < kValueTile; i += 32)
    to.v[i] = work.first_value + i < p.value_dim ? load_as_float(p.v, false, p.dtype, v + i) : 0.f;
  if (lane_index() == 0) {
    int64_t const beta = work.offset(p.beta_strides, t, work.value_head);
    to.beta = write_strength(p, load_as_float(p.beta, p.beta_is_fp32, p.dtype, beta));
  }
  finish_token(to, x, p, work, t);
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
