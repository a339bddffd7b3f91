// What the microbenchmarks of the chunkwise operations have in common: shapes and gate regimes, those of
// bench/python/shapes.py, inputs that the host knows, and what the recurrence in double takes of a token.
#pragma once
#include <cmath>
#include <cstring>
#include <random>

#include "bench/cpp/run.h"
#include "kda/chunk/inputs.h"
#include "kda/dtype.h"

namespace bench {

using kda::Dtype;

struct Shape {
  int tokens, heads;
  std::vector<int> lengths;

  int sequences() const { return int(lengths.size()); }
  std::string name() const {
    return "T" + std::to_string(tokens) + "_H" + std::to_string(heads) + "_N" + std::to_string(sequences());
  }
};

inline Shape even(int tokens, int heads, int sequences) {
  return {tokens, heads, std::vector<int>(size_t(sequences), tokens / sequences)};
}

/// Fast: bounded gate at -5, no channel remembers for 16 tokens. Long: the released model's gate at its initialisation.
enum class Regime { kFast, kLong };

struct Config {
  Shape shape;
  Regime regime;
  Dtype dtype;
  int dim;  // K and V

  size_t element() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
  size_t rows() const { return size_t(shape.tokens) * shape.heads; }
  double error_limit() const { return dtype == Dtype::kFloat32 ? 1e-5 : dtype == Dtype::kFloat16 ? 2e-3 : 1e-2; }
  float scale() const { return 1 / std::sqrt(float(dim)); }
  std::string name() const {
    char const* const type = dtype == Dtype::kFloat32 ? "fp32" : dtype == Dtype::kFloat16 ? "fp16" : "bf16";
    return std::string(type) + "_k" + std::to_string(dim) + "/" + shape.name() +
           (regime == Regime::kFast ? "/fast" : "/long");
  }
};

template <class E>
void store(std::vector<char>& to, size_t i, float x) {
  E const rounded = kda::from_float<E>(x);
  std::memcpy(&to[i * sizeof(E)], &rounded, sizeof(E));
}

template <class E>
double load(char const* from, size_t i) {
  E x;
  std::memcpy(&x, from + i * sizeof(E), sizeof(E));
  return kda::to_float(x);
}

/// Elements in a dtype that only the run knows.
struct Elements {
  std::vector<char> bytes;
  Dtype dtype;

  void set(size_t i, float x) {
    if (dtype == Dtype::kFloat32) store<float>(bytes, i, x);
    else if (dtype == Dtype::kFloat16) store<kda::Fp16>(bytes, i, x);
    else store<kda::Bf16>(bytes, i, x);
  }
  double operator[](size_t i) const {
    if (dtype == Dtype::kFloat32) return load<float>(bytes.data(), i);
    return dtype == Dtype::kFloat16 ? load<kda::Fp16>(bytes.data(), i) : load<kda::Bf16>(bytes.data(), i);
  }
};

/// A stream of inputs: a pattern over and over, so that the host knows every element. Its length is odd: no two tokens
/// near each other are the same.
struct Stream {
  static constexpr size_t kPeriod = 1000003;
  Elements pattern;
  DeviceBuffer on_device;

  Stream(size_t count, Dtype dtype, float scale, unsigned seed)
      : pattern{std::vector<char>(kPeriod * (dtype == Dtype::kFloat32 ? 4 : 2)), dtype},
        on_device(count * (dtype == Dtype::kFloat32 ? 4 : 2)) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < kPeriod; ++i) pattern.set(i, scale * normal(generator));
    on_device.fill(pattern.bytes);
  }
  double operator[](size_t i) const { return pattern[i % kPeriod]; }
};

template <class T>
void upload(DeviceBuffer const& to, std::vector<T> const& from) {
  check(cudaMemcpy(to.at(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
}

/// A token of a head in double, after its input transforms.
struct Token {
  std::vector<double> q, k, decay;
  double q_norm, k_norm, beta;
};

/// The log-decay of one channel, and its derivatives by the gate as given and by A_log.
struct GateAt {
  double log_decay, by_gate, by_A_log;
};

/// `sets` sets of inputs of a configuration, everything fused: raw gates, q and k to be normalised, logits of beta.
class Inputs {
 public:
  Inputs(Config const& c, int sets)
      : config(c),
        q(sets * c.rows() * c.dim, c.dtype, 1, 0),
        k(sets * c.rows() * c.dim, c.dtype, 1, 1),
        v(sets * c.rows() * c.dim, c.dtype, 1, 2),
        g(sets * c.rows() * c.dim, c.dtype, c.regime == Regime::kFast ? 1.f : 0.1f, 3),
        beta(sets * c.rows(), c.dtype, 1, 4),
        cu_seqlens((c.shape.sequences() + 1) * sizeof(int32_t)),
        A_log_on_device(c.shape.heads * sizeof(float)),
        dt_bias_on_device(size_t(c.shape.heads) * c.dim * sizeof(float)) {
    std::mt19937 generator(5);
    std::uniform_real_distribution<float> uniform;
    for (int h = 0; h < c.shape.heads; ++h)
      A_log.push_back(c.regime == Regime::kFast ? uniform(generator) : std::log(1 + 15 * uniform(generator)));
    for (int i = 0; i < c.shape.heads * c.dim; ++i) {
      float const dt = std::exp(uniform(generator) * 4.605170186f - 6.907755279f);  // [1e-3, 1e-1], log-uniform
      dt_bias.push_back(c.regime == Regime::kFast ? uniform(generator) : dt + std::log(-std::expm1(-dt)));
    }
    bounds.push_back(0);
    for (int length : c.shape.lengths) bounds.push_back(bounds.back() + length);
    upload(A_log_on_device, A_log), upload(dt_bias_on_device, dt_bias), upload(cu_seqlens, bounds);
  }

  /// What a call depends on before it has memory.
  template <class Params>
  Params sizes(int chunk) const {
    bool const one = config.shape.sequences() == 1;
    Params p{};
    p.plan = {config.shape.tokens, config.shape.sequences(), one ? nullptr : cu_seqlens.at(), false, chunk, {}};
    p.heads = p.value_heads = config.shape.heads, p.key_dim = p.value_dim = config.dim;
    return p;
  }
  /// With the inputs of a set.
  template <class Params>
  Params params(int chunk, int set) const {
    Params p = sizes<Params>(chunk);
    p.q = rows(q.on_device, set), p.k = rows(k.on_device, set), p.v = rows(v.on_device, set);
    p.g = rows(g.on_device, set), p.beta = scalars(beta.on_device, set);
    p.scale = config.scale();
    p.l2norm = p.beta_sigmoid = true;
    p.gate = {config.regime == Regime::kFast ? kda::GateKind::kBounded : kda::GateKind::kSoftplus,
              A_log_on_device.at<float const>(), dt_bias_on_device.at<float const>(), -5.f};
    return p;
  }
  /// [tokens, heads, dim] and [tokens, heads] of a set, as the kernels see them.
  kda::Rows rows(DeviceBuffer const& x, int set) const {
    int64_t const dim = config.dim, heads = config.shape.heads, rows = int64_t(config.rows());
    size_t const first = size_t(set) * config.rows();
    return {
        x.at(first * dim * config.element()), {rows * dim, heads * dim, dim}, config.dtype == Dtype::kFloat32, true};
  }
  kda::Rows scalars(DeviceBuffer const& x, int set) const {
    int64_t const heads = config.shape.heads, rows = int64_t(config.rows());
    size_t const first = size_t(set) * config.rows();
    return {x.at(first * config.element()), {rows, heads, 1}, config.dtype == Dtype::kFloat32, false};
  }

  /// Of set 0.
  Token token(int t, int head) const {
    int const dim = config.dim;
    size_t const row = row_of(t, head);
    Token x{std::vector<double>(dim),      std::vector<double>(dim), std::vector<double>(dim), 1e-6, 1e-6,
            1 / (1 + std::exp(-beta[row]))};
    for (int d = 0; d < dim; ++d) {
      x.q[d] = q[row * dim + d], x.k[d] = k[row * dim + d];
      x.q_norm += x.q[d] * x.q[d], x.k_norm += x.k[d] * x.k[d];
      x.decay[d] = std::exp(gate_at(t, head, d).log_decay);
    }
    x.q_norm = std::sqrt(x.q_norm), x.k_norm = std::sqrt(x.k_norm);
    for (int d = 0; d < dim; ++d) x.q[d] /= x.q_norm, x.k[d] /= x.k_norm;
    return x;
  }
  GateAt gate_at(int t, int head, int channel) const {
    double const A = std::exp(double(A_log[head]));
    double const y = g[row_of(t, head) * config.dim + channel] + dt_bias[size_t(head) * config.dim + channel];
    if (config.regime == Regime::kLong) {
      double const decay = -A * std::log1p(std::exp(y));
      return {decay, -A / (1 + std::exp(-y)), decay};
    }
    double const sigmoid = 1 / (1 + std::exp(-A * y)), slope = -5 * A * sigmoid * (1 - sigmoid);
    return {-5 * sigmoid, slope, slope * y};
  }
  size_t row_of(int t, int head) const { return size_t(t) * config.shape.heads + head; }

  /// What the device has of set 0 of one head, `columns` values a token.
  Elements of_head(DeviceBuffer const& x, int head, int begin, int end, int columns) const {
    size_t const width = columns * config.element(), pitch = config.shape.heads * width, tokens = size_t(end - begin);
    Elements out{std::vector<char>(tokens * width), config.dtype};
    check(cudaMemcpy2D(out.bytes.data(), width, x.at(begin * pitch + head * width), pitch, width, tokens,
                       cudaMemcpyDeviceToHost),
          "download");
    return out;
  }

  Config config;
  Stream q, k, v, g, beta;
  DeviceBuffer cu_seqlens, A_log_on_device, dt_bias_on_device;
  std::vector<float> A_log, dt_bias;
  std::vector<int32_t> bounds;
};

inline double relative_error(std::vector<double> const& x, std::vector<double> const& truth) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i)
    difference += (x[i] - truth[i]) * (x[i] - truth[i]), norm += truth[i] * truth[i];
  return std::sqrt(difference / norm);
}

/// The time of every kernel of the calls by itself, among the counters.
inline void time_kernels(benchmark::State& run, Graph const& calls) {
  for (std::string const& kernel : calls.kernels()) {
    if (kernel.find("reset") != std::string::npos) continue;  // the others would wait for what it sets back
    Graph const alone = calls.only(kernel);
    alone.seconds();
    std::vector<double> us(20);
    for (double& x : us) x = 1e6 * alone.seconds();
    run.counters[kernel + "_us"] = median(us);
  }
}

}  // namespace bench
