// The chunkwise forward through the core's launch, over the shapes and the two gate regimes of bench/python/shapes.py:
// microseconds of a call and of each of its kernels inside a CUDA graph, bytes, tokens, and the share of what a copy of
// the same bytes reaches by turns with it. Every configuration is verified against the recurrence in double before it
// is timed; inputs rotate through more memory than the L2 holds. No torch.
//
//   bench_chunk_fwd [--benchmark_filter=bf16_k128/T8192] [--benchmark_out=FILE --benchmark_out_format=json]
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "bench/cpp/run.h"
#include "kda/chunk_fwd/dispatch.h"

namespace {

using bench::check;
using bench::Device;
using bench::DeviceBuffer;
using kda::Dtype;

struct Shape {
  int tokens, heads;
  std::vector<int> lengths;

  int sequences() const { return int(lengths.size()); }
  std::string name() const {
    return "T" + std::to_string(tokens) + "_H" + std::to_string(heads) + "_N" + std::to_string(sequences());
  }
};

Shape even(int tokens, int heads, int sequences) {
  return {tokens, heads, std::vector<int>(size_t(sequences), tokens / sequences)};
}

std::vector<Shape> shapes() {
  std::vector<Shape> all = {even(2048, 12, 1), even(2048, 16, 1), even(4096, 8, 1), even(4096, 12, 1),
                            even(8192, 12, 4), even(8192, 16, 1), even(1024, 4, 1), even(3072, 10, 1),
                            even(8192, 24, 1), even(16384, 16, 8)};
  for (int heads : {64, 96})
    for (Shape const& shape :
         {even(8192, heads, 1), Shape{8192, heads, {1300, 547, 2048, 963, 271, 3063}}, even(8192, heads, 8)})
      all.push_back(shape);
  return all;
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
  size_t state_bytes() const { return size_t(shape.sequences()) * shape.heads * dim * dim * sizeof(float); }
  /// What a call must move: q, k, v, g, beta in; o and the final states out.
  size_t bytes() const { return rows() * (5 * dim + 1) * element() + state_bytes(); }
  double error_limit() const { return dtype == Dtype::kFloat32 ? 1e-5 : dtype == Dtype::kFloat16 ? 2e-3 : 1e-2; }
  std::string name() const {
    char const* const type = dtype == Dtype::kFloat32 ? "fp32" : dtype == Dtype::kFloat16 ? "fp16" : "bf16";
    return "chunk_fwd/" + std::string(type) + "_k" + std::to_string(dim) + "/" + shape.name() +
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

/// The memory of a configuration: `sets` sets of inputs and outputs, and the workspace of one call.
class Problem {
 public:
  Problem(Config const& c, int sets, kda::ChunkFwdVariant const& chosen)
      : config(c),
        variant(chosen),
        q(sets * c.rows() * c.dim, c.dtype, 1, 0),
        k(sets * c.rows() * c.dim, c.dtype, 1, 1),
        v(sets * c.rows() * c.dim, c.dtype, 1, 2),
        g(sets * c.rows() * c.dim, c.dtype, c.regime == Regime::kFast ? 1.f : 0.1f, 3),
        beta(sets * c.rows(), c.dtype, 1, 4),
        o(sets * c.rows() * c.dim * c.element()),
        final_state(sets * c.state_bytes()),
        cu_seqlens((c.shape.sequences() + 1) * sizeof(int32_t)),
        A_log_on_device(c.shape.heads * sizeof(float)),
        dt_bias_on_device(size_t(c.shape.heads) * c.dim * sizeof(float)),
        workspace(chosen.workspace_bytes(kda::ChunkFwdCall(sizes()))) {
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

  kda::ChunkPlan plan() const {
    bool const one = config.shape.sequences() == 1;
    return {config.shape.tokens, config.shape.sequences(), one ? nullptr : cu_seqlens.at(), false, variant.chunk, {}};
  }

  /// What a call depends on before it has memory.
  kda::ChunkFwdParams sizes() const {
    kda::ChunkFwdParams p{};
    p.plan = plan();
    p.heads = p.value_heads = config.shape.heads, p.key_dim = p.value_dim = config.dim;
    return p;
  }

  kda::ChunkFwdParams params(int set) const {
    int const heads = config.shape.heads, dim = config.dim;
    size_t const first = size_t(set) * config.rows();
    kda::ChunkFwdParams p = sizes();
    kda::RowStrides const strides{int64_t(config.rows()) * dim, int64_t(heads) * dim, dim};
    auto const rows = [&](DeviceBuffer const& x) {
      return kda::Rows{x.at(first * dim * config.element()), strides, config.dtype == Dtype::kFloat32, true};
    };
    p.q = rows(q.on_device), p.k = rows(k.on_device), p.v = rows(v.on_device), p.g = rows(g.on_device), p.o = rows(o);
    p.beta = {beta.on_device.at(first * config.element()), {int64_t(config.rows()), heads, 1}, p.q.is_fp32, false};
    p.scale = 1 / std::sqrt(float(dim));
    p.l2norm = p.beta_sigmoid = true;
    p.gate = {config.regime == Regime::kFast ? kda::GateKind::kBounded : kda::GateKind::kSoftplus,
              A_log_on_device.at<float const>(), dt_bias_on_device.at<float const>(), -5.f};
    p.final_state = {final_state.at(set * config.state_bytes()),
                     {{}, config.shape.sequences(), false},
                     int64_t(heads) * dim * dim,
                     kda::Dtype::kFloat32,
                     true};
    p.clear_unowned = p.plan.cu_seqlens != nullptr;  // as the op does
    p.workspace = workspace.at();
    return p;
  }

  Config config;
  kda::ChunkFwdVariant const& variant;
  Stream q, k, v, g, beta;
  DeviceBuffer o, final_state, cu_seqlens, A_log_on_device, dt_bias_on_device;
  DeviceBuffer workspace;
  std::vector<float> A_log, dt_bias;
  std::vector<int32_t> bounds;
};

/// Some columns of V of one head of one sequence; the recurrence never mixes columns.
struct Sample {
  int sequence, head;
  std::vector<int> columns;
};

struct Outputs {
  std::vector<double> o, state;  // [tokens][columns], [columns][K]
};

double log_decay(Problem const& x, int head, int channel, double g) {
  double const A = std::exp(double(x.A_log[head])), y = g + x.dt_bias[size_t(head) * x.config.dim + channel];
  if (x.config.regime == Regime::kFast) return -5 / (1 + std::exp(-A * y));
  return -A * std::log1p(std::exp(y));
}

/// The recurrence in double: S <- S Diag(exp g); S <- S + beta (v - S k) k^T; o = scale S q.
Outputs recurrence(Problem const& x, Sample const& sample) {
  int const dim = x.config.dim, columns = int(sample.columns.size());
  Outputs out{{}, std::vector<double>(size_t(columns) * dim)};
  std::vector<double> q(dim), k(dim), decay(dim);
  for (int t = x.bounds[sample.sequence]; t < x.bounds[sample.sequence + 1]; ++t) {
    size_t const row = size_t(t) * x.config.shape.heads + sample.head;
    double q_square = 1e-6, k_square = 1e-6;
    for (int d = 0; d < dim; ++d) {
      q[d] = x.q[row * dim + d], k[d] = x.k[row * dim + d];
      q_square += q[d] * q[d], k_square += k[d] * k[d];
      decay[d] = std::exp(log_decay(x, sample.head, d, x.g[row * dim + d]));
    }
    double const q_scale = 1 / std::sqrt(q_square * dim), k_scale = 1 / std::sqrt(k_square);
    double const beta = 1 / (1 + std::exp(-x.beta[row]));
    for (int d = 0; d < dim; ++d) q[d] *= q_scale, k[d] *= k_scale;
    for (int j = 0; j < columns; ++j) {
      double* const state = &out.state[size_t(j) * dim];
      double on_key = 0, o = 0;
      for (int d = 0; d < dim; ++d) state[d] *= decay[d], on_key += state[d] * k[d];
      double const change = beta * (x.v[row * dim + sample.columns[j]] - on_key);
      for (int d = 0; d < dim; ++d) state[d] += k[d] * change, o += state[d] * q[d];
      out.o.push_back(o);
    }
  }
  return out;
}

/// What the kernels wrote of set 0 for the same sample.
Outputs computed(Problem const& x, Sample const& sample) {
  Config const& c = x.config;
  size_t const row_bytes = size_t(c.shape.heads) * c.dim * c.element(), begin = x.bounds[sample.sequence];
  size_t const tokens = x.bounds[sample.sequence + 1] - begin, head_bytes = c.dim * c.element();
  Elements o{std::vector<char>(tokens * head_bytes), c.dtype};
  check(cudaMemcpy2D(o.bytes.data(), head_bytes, x.o.at(begin * row_bytes + sample.head * head_bytes), row_bytes,
                     head_bytes, tokens, cudaMemcpyDeviceToHost),
        "download");
  std::vector<float> state(size_t(c.dim) * c.dim);
  size_t const at = (size_t(sample.sequence) * c.shape.heads + sample.head) * state.size();
  check(cudaMemcpy(state.data(), x.final_state.at(at * 4), state.size() * 4, cudaMemcpyDeviceToHost), "download");
  Outputs out;
  for (size_t t = 0; t < tokens; ++t)
    for (int j : sample.columns) out.o.push_back(o[t * c.dim + j]);
  for (int j : sample.columns)
    for (int d = 0; d < c.dim; ++d) out.state.push_back(state[size_t(j) * c.dim + d]);
  return out;
}

double relative_error(std::vector<double> const& x, std::vector<double> const& truth) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i)
    difference += (x[i] - truth[i]) * (x[i] - truth[i]), norm += truth[i] * truth[i];
  return std::sqrt(difference / norm);
}

/// Runs set 0 on poisoned outputs and compares samples with the recurrence; throws where they differ.
double verify(Problem const& x, cudaStream_t stream) {
  Config const& c = x.config;
  check(cudaMemset(x.o.at(), 0xFF, x.o.bytes()), "poison");
  check(cudaMemset(x.final_state.at(), 0xFF, x.final_state.bytes()), "poison");
  x.variant.launch(x.params(0), stream);
  check(cudaStreamSynchronize(stream), "kda::chunk_fwd");
  int const last = c.shape.sequences() - 1, heads = c.shape.heads, dim = c.dim;
  Sample const samples[] = {
      {0, 0, {0, dim / 2 + 1}}, {last / 2, heads / 2, {dim / 4 + 3, dim - 2}}, {last, heads - 1, {7, dim - 1}}};
  double worst = 0;
  for (Sample const& sample : samples) {
    Outputs const truth = recurrence(x, sample), ours = computed(x, sample);
    for (double error : {relative_error(ours.o, truth.o), relative_error(ours.state, truth.state)}) {
      if (!(error <= c.error_limit()))
        throw std::runtime_error("wrong result in sequence " + std::to_string(sample.sequence) + ", head " +
                                 std::to_string(sample.head) + ": error " + std::to_string(error));
      worst = std::max(worst, error);
    }
  }
  return worst;
}

void chunk_fwd(benchmark::State& run, Config const& config) {
  cudaStream_t const stream = Device::get().stream;
  kda::ChunkFwdVariant const* const variant =
      kda::select_chunk_fwd(config.dtype, config.dim, 64, {kda::has_wgmma(), kda::shared_memory_limit()});
  if (!variant) throw std::runtime_error("no variant fits this device");
  int const sets = int(bench::sets_of(config.bytes(), 64));
  Problem const problem(config, sets, *variant);
  double const error = verify(problem, stream);

  bench::Graph const calls(stream, sets, [&](int i) { variant->launch(problem.params(i), stream); });
  double const us = bench::time_beside_copies(run, calls, config.bytes());
  run.counters["error"] = error, run.counters["tokens_per_s"] = 1e6 * config.shape.tokens / us;
  for (std::string const& kernel : calls.kernels()) {
    if (kernel.find("reset") != std::string::npos) continue;  // the others would wait for what it sets back
    bench::Graph const alone = calls.only(kernel);
    alone.seconds();
    std::vector<double> alone_us(20);
    for (double& x : alone_us) x = 1e6 * alone.seconds();
    run.counters[kernel + "_us"] = bench::median(alone_us);
  }
  run.SetLabel(variant->name);
}

void register_all() {
  std::vector<Config> configs;
  for (Shape const& shape : shapes())
    for (Regime regime : {Regime::kFast, Regime::kLong}) configs.push_back({shape, regime, Dtype::kBfloat16, 128});
  for (auto const& [dtype, dim] : {std::pair(Dtype::kFloat16, 128), std::pair(Dtype::kFloat32, 128),
                                   std::pair(Dtype::kBfloat16, 64), std::pair(Dtype::kBfloat16, 256)})
    for (Shape const& shape : {even(8192, 16, 1), even(8192, 64, 8)})
      configs.push_back({shape, Regime::kLong, dtype, dim});
  for (Config const& config : configs) bench::add(config.name(), config, chunk_fwd);
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  return bench::run("bench_chunk_fwd", argc, argv);
}
