// short_conv and gated_rmsnorm on a case: its q as the stream, with weights and gradients made here.
#pragma once
#include "kda/gated_rmsnorm/dispatch.h"
#include "kda/short_conv/dispatch.h"
#include "tests/case_kernels.h"

namespace kda::tests {

using Tensors = std::map<std::string, CaseTensor>;

/// fp32 numbers of both signs; `seed` tells tensors apart.
inline CaseTensor made(std::vector<int64_t> shape, uint32_t seed) {
  CaseTensor const x(FileDtype::kFloat32, std::move(shape));
  for (int64_t i = 0; i < x.elements(); ++i) x.data<float>()[i] = real(uint32_t(i), seed);
  return x;
}
inline double silu_slope(double z) {
  double const s = 1 / (1 + std::exp(-z));
  return s * (1 + z * (1 - s));
}
inline double rounding_of(FileDtype dtype) {
  return dtype == FileDtype::kFloat32 ? 2e-6 : dtype == FileDtype::kFloat16 ? 1e-3 : 8e-3;
}
inline std::pair<double, double> budget_of(CaseTensor const& x) {
  return {rounding_of(x.dtype), 10 * rounding_of(x.dtype)};
}

// ---- short_conv ------------------------------------------------------------------------------------------------

/// q as [batch, tokens, channels] without its last `odd` channels; with states, and a gradient of the final ones.
struct ConvCase {
  CaseFile const& c;
  int64_t taps, odd;
  CaseTensor x, dy, weight, bias, state, dfinal;

  ConvCase(CaseFile const& file, int64_t number_of_taps, int64_t left_out)
      : c(file), taps(number_of_taps), odd(left_out), x(file["q"]) {
    int64_t const channels = x.shape[2] * x.shape[3] - odd;
    dy = in_dtype(made({x.shape[0], x.shape[1], x.shape[2] * x.shape[3]}, 21), x.dtype);
    weight = made({channels, taps}, 22), bias = made({channels}, 23);
    state = made({sequences_of(c), channels, taps - 1}, 24), dfinal = made(state.shape, 25);
  }
  int64_t channels() const { return weight.shape[0]; }
  int64_t width() const { return channels() + odd; }
  /// Channels of the first stream, and before the third one.
  std::pair<int64_t, int64_t> stream_ends() const {
    int64_t const piece = odd ? 1 : 16, first = channels() / 3 / piece * piece;
    return {first, channels() - first};
  }
  /// Three streams side by side in one tensor.
  void set_streams(ConvStreams& streams, CaseTensor const& t) const {
    auto const [first, third] = stream_ends();
    int64_t const begins[] = {0, first, third}, width_ = width(), bytes = bytes_of_dtype(t.dtype);
    for (int i = 0; i < kConvStreams; ++i)
      streams[i] = {static_cast<char*>(t.data()) + begins[i] * bytes, t.shape[1] * width_, width_};
  }
  ConvStates states(CaseTensor const& t) const {
    return {t.data(), Dtype::kFloat32, channels() * (taps - 1), taps - 1, 1};
  }
  std::pair<int64_t, int64_t> bounds(int64_t n) const {
    if (!c.has("cu_seqlens")) return {0, x.shape[1]};
    return {int64_t(c["cu_seqlens"][n]), int64_t(c["cu_seqlens"][n + 1])};
  }
  /// Beside the sequences' tokens and the channels of the call: zeros, as nothing is written there.
  CaseTensor zeros() const {
    CaseTensor const y(x.dtype, {x.shape[0], x.shape[1], width()});
    std::memset(y.data(), 0, y.bytes().size());
    return y;
  }
  void set(ShortConvCall& p) const {
    set_streams(p.x, x);
    auto const [first, third] = stream_ends();
    p.stream_end[0] = int32_t(first), p.stream_end[1] = int32_t(third), p.stream_end[2] = int32_t(channels());
    p.weight = weight.data(), p.bias = bias.data(), p.weight_dtype = Dtype::kFloat32;
    p.initial_state = states(state);
    p.plan.tokens = x.shape[1], p.plan.sequences = int32_t(sequences_of(c));
    p.plan.cu_seqlens = c.pointer_or_null<void>("cu_seqlens");
    p.plan.cu_seqlens_is_int64 = c.has("cu_seqlens") && c["cu_seqlens"].dtype == FileDtype::kInt64;
    p.channels = int32_t(channels()), p.taps = int32_t(taps), p.activation = Activation::kSilu;
    p.in_pieces = odd == 0 && width() * bytes_of_dtype(x.dtype) % 16 == 0;
  }
};

inline Tensors run_conv_fwd(ConvCase const& k) {
  CaseTensor const y = k.zeros(), final_state(FileDtype::kFloat32, k.state.shape);
  ShortConvFwdParams p{};
  k.set(p);
  k.set_streams(p.y, y), p.final_state = k.states(final_state);
  ShortConvVariant const& variant = select_short_conv(kernel_dtype(k.x));
  variant.plan_fwd(p, k.x.shape[0] * k.x.shape[1]);
  variant.fwd(p, nullptr);
  return {{"y", y}, {"final_state", final_state}};
}
inline Tensors run_conv_bwd(ConvCase const& k) {
  CaseTensor const dx = k.zeros(), dweight(FileDtype::kFloat32, k.weight.shape);
  CaseTensor const dbias(FileDtype::kFloat32, k.bias.shape), dstate(FileDtype::kFloat32, k.state.shape);
  ShortConvBwdParams p{};
  k.set(p);
  k.set_streams(p.dy, k.dy), k.set_streams(p.dx, dx);
  p.d_final_state = k.states(k.dfinal), p.d_initial_state = k.states(dstate);
  p.dweight = dweight.data(), p.dbias = dbias.data();
  ShortConvVariant const& variant = select_short_conv(kernel_dtype(k.x));
  variant.plan_bwd(p, k.x.shape[0] * k.x.shape[1]);
  CaseTensor const partial(FileDtype::kFloat32, {p.run_blocks, k.taps + 1, k.channels()});
  p.partial = partial.data<float>();
  variant.bwd(p, nullptr);
  return {{"dx", dx}, {"dweight", dweight}, {"dbias", dbias}, {"dstate", dstate}};
}

/// The equations of docs/mathematics.md, section 7, in float64, stored as fp32.
class ConvTruth {
 public:
  explicit ConvTruth(ConvCase const& k) : k_(k), past_(k.taps - 1) {
    for (auto const& [name, like] : std::map<std::string, std::vector<int64_t>>{{"y", k.zeros().shape},
                                                                                {"dx", k.zeros().shape},
                                                                                {"dweight", k.weight.shape},
                                                                                {"dbias", k.bias.shape},
                                                                                {"final_state", k.state.shape},
                                                                                {"dstate", k.state.shape}}) {
      CaseTensor const x(FileDtype::kFloat32, like);
      std::memset(x.data(), 0, x.bytes().size());
      truth.emplace(name, x);
    }
    for (int64_t n = 0; n < sequences_of(k.c); ++n)
      for (int64_t channel = 0; channel < k.channels(); ++channel) add(n, channel);
  }
  Tensors truth;

 private:
  ConvCase const& k_;
  int64_t past_;
  float* at(char const* name) { return truth.at(name).data<float>(); }

  void add(int64_t n, int64_t channel) {
    auto const [begin, end] = k_.bounds(n);
    int64_t const row = k_.c.has("cu_seqlens") ? 0 : n, length = end - begin;
    int64_t const states = (n * k_.channels() + channel) * past_;
    auto const place = [&, first = begin](int64_t t) {
      return (row * k_.x.shape[1] + first + t) * k_.width() + channel;
    };
    std::vector<double> seen(size_t(past_ + length)), d(seen.size(), 0.);
    for (int64_t i = 0; i < past_ + length; ++i)
      seen[size_t(i)] = i < past_ ? k_.state[states + i] : k_.x[place(i - past_)];
    for (int64_t t = 0; t < length; ++t) {
      double z = k_.bias[channel];
      for (int64_t j = 0; j <= past_; ++j) z += k_.weight[channel * k_.taps + j] * seen[size_t(t + j)];
      at("y")[place(t)] = float(z / (1 + std::exp(-z)));
      double const dz = k_.dy[place(t)] * silu_slope(z);
      at("dbias")[channel] += float(dz);
      for (int64_t j = 0; j <= past_; ++j) {
        d[size_t(t + j)] += k_.weight[channel * k_.taps + j] * dz;
        at("dweight")[channel * k_.taps + j] += float(dz * seen[size_t(t + j)]);
      }
    }
    for (int64_t i = 0; i < past_; ++i) {
      at("final_state")[states + i] = float(seen[size_t(length + i)]);
      d[size_t(length + i)] += k_.dfinal[states + i];
    }
    for (int64_t i = 0; i < past_ + length; ++i)
      (i < past_ ? at("dstate")[states + i] : at("dx")[place(i - past_)]) = float(d[size_t(i)]);
  }
};

/// Four taps of pieces, eight of pieces, and single channels; each of three streams.
inline void add_short_conv(std::vector<CaseRun>& runs, CaseFile const& c) {
  std::string const type = dtype_name(c["q"].dtype);
  for (auto const& [taps, odd] : {std::pair<int64_t, int64_t>{4, 0}, {8, 0}, {3, 1}}) {
    auto const k = std::make_shared<ConvCase>(c, taps, odd);
    ConvTruth const of(*k);
    std::string const what = type + (odd ? " single" : " taps" + std::to_string(taps));
    std::pair<double, double> const sums = {1e-5, 1e-4}, tokens = budget_of(k->x);
    runs.push_back({"short_conv_fwd " + what,
                    [k] { return run_conv_fwd(*k); },
                    of.truth,
                    {{"y", tokens}, {"final_state", {0, 0}}}});
    runs.push_back({"short_conv_bwd " + what,
                    [k] { return run_conv_bwd(*k); },
                    of.truth,
                    {{"dx", tokens}, {"dweight", sums}, {"dbias", sums}, {"dstate", sums}}});
  }
}

// ---- gated_rmsnorm ---------------------------------------------------------------------------------------------

/// q as rows of `dim` elements, its k as the gate.
struct NormCase {
  CaseTensor x, gate, dy, weight;
  int64_t dim;

  NormCase(CaseFile const& c, int64_t row) : x(c["q"]), gate(c["k"]), dim(row) {
    dy = in_dtype(made(x.shape, 31), x.dtype), weight = made({dim}, 32);
  }
  int64_t rows() const { return x.elements() / dim; }
  GatedRmsNormParams params(CaseTensor const& y) const {
    GatedRmsNormParams p{};
    p.x = {x.data(), dim, dim}, p.gate = {gate.data(), dim, dim}, p.y = {y.data(), dim, dim};
    p.in_pieces = dim * bytes_of_dtype(x.dtype) % 16 == 0;
    p.weight = weight.data(), p.weight_dtype = Dtype::kFloat32;
    p.outer = rows(), p.heads = 1, p.dim = int32_t(dim), p.eps = 1e-5f, p.per_dim = 1.f / float(dim);
    p.activation = Activation::kSilu;
    return p;
  }
};

/// A few elements at the end are no whole row: no kernel touches them.
inline CaseTensor norm_output(NormCase const& k) {
  CaseTensor const y(k.x.dtype, k.x.shape);
  std::memset(y.data(), 0, y.bytes().size());
  return y;
}
inline Tensors run_norm_fwd(NormCase const& k) {
  CaseTensor const y = norm_output(k);
  GatedRmsNormParams const p = k.params(y);
  select_gated_rmsnorm(kernel_dtype(k.x)).fwd(p, nullptr);
  return {{"y", y}};
}
inline Tensors run_norm_bwd(NormCase const& k) {
  CaseTensor const dx = norm_output(k), dgate = norm_output(k), dweight(FileDtype::kFloat32, {k.dim});
  GatedRmsNormParams p = k.params(k.dy);
  p.dx = {dx.data(), k.dim, k.dim}, p.dgate = {dgate.data(), k.dim, k.dim}, p.dweight = dweight.data();
  p.runs = gated_rmsnorm_runs(k.rows());
  CaseTensor const partial(FileDtype::kFloat32, {p.runs, k.dim});
  p.partial = partial.data<float>();
  select_gated_rmsnorm(kernel_dtype(k.x)).bwd(p, nullptr);
  return {{"dx", dx}, {"dgate", dgate}, {"dweight", dweight}};
}

/// The equations of docs/mathematics.md, section 7, in float64, stored as fp32.
inline Tensors norm_truth(NormCase const& k) {
  CaseTensor const y(FileDtype::kFloat32, k.x.shape), dx(FileDtype::kFloat32, k.x.shape);
  CaseTensor const dgate(FileDtype::kFloat32, k.x.shape), dweight(FileDtype::kFloat32, {k.dim});
  for (CaseTensor const& t : {y, dx, dgate, dweight}) std::memset(t.data(), 0, t.bytes().size());
  for (int64_t row = 0; row < k.rows(); ++row) {
    double squares = 0, mean = 0;
    for (int64_t i = row * k.dim; i < (row + 1) * k.dim; ++i) squares += k.x[i] * k.x[i];
    double const rstd = 1 / std::sqrt(squares / double(k.dim) + 1e-5f);
    auto const open = [&](int64_t i) { return k.gate[i] / (1 + std::exp(-k.gate[i])); };
    for (int64_t i = row * k.dim; i < (row + 1) * k.dim; ++i)
      mean += k.x[i] * rstd * k.dy[i] * k.weight[i % k.dim] * open(i) / double(k.dim);
    for (int64_t i = row * k.dim; i < (row + 1) * k.dim; ++i) {
      double const n = k.x[i] * rstd, weight = k.weight[i % k.dim], dn = k.dy[i] * weight * open(i);
      y.data<float>()[i] = float(n * weight * open(i));
      dx.data<float>()[i] = float(rstd * (dn - n * mean));
      dgate.data<float>()[i] = float(k.dy[i] * n * weight * silu_slope(k.gate[i]));
      dweight.data<float>()[i % k.dim] += float(k.dy[i] * n * open(i));
    }
  }
  return {{"y", y}, {"dx", dx}, {"dgate", dgate}, {"dweight", dweight}};
}

/// Rows of 8, 16 and 32 lanes, and rows that are read by loops.
inline void add_gated_rmsnorm(std::vector<CaseRun>& runs, CaseFile const& c) {
  std::string const type = dtype_name(c["q"].dtype);
  for (int64_t const dim : {40, 72, 136, 21}) {
    if (c["q"].elements() < dim) continue;
    auto const k = std::make_shared<NormCase>(c, dim);
    Tensors const truth = norm_truth(*k);
    std::string const what = type + (dim == 21 ? " wide" : " d" + std::to_string(dim));
    auto const tokens = budget_of(k->x);
    runs.push_back({"gated_rmsnorm_fwd " + what, [k] { return run_norm_fwd(*k); }, truth, {{"y", tokens}}});
    runs.push_back({"gated_rmsnorm_bwd " + what,
                    [k] { return run_norm_bwd(*k); },
                    truth,
                    {{"dx", tokens}, {"dgate", tokens}, {"dweight", {1e-5, 1e-4}}}});
  }
}

}  // namespace kda::tests
