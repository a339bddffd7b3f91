// kda::decode on states in a pool: microseconds, bytes, and the share of what a copy of the same bytes reaches in the
// same graph. Every configuration is verified against the recurrence in double before it is timed; inputs and states
// rotate through more memory than the L2 holds. No torch.
//
//   bench_decode [--benchmark_filter=fp32/...] [--benchmark_out=FILE --benchmark_out_format=json]
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "bench/cpp/run.h"
#include "kda/decode/dispatch.h"

namespace {

using bench::check;
using bench::Device;
using bench::DeviceBuffer;
using kda::Bf16;

constexpr int kDim = 128;  // K and V
constexpr size_t kPatternElements = 1 << 20;

struct Config {
  kda::Dtype state_dtype;
  int batch, heads, tokens;

  size_t element() const { return state_dtype == kda::Dtype::kFloat32 ? 4 : 2; }
  size_t state_bytes() const { return size_t(batch) * heads * kDim * kDim * element(); }  // of one step
  size_t rows() const { return size_t(batch) * tokens * heads; }
  /// What a step must move: every state once in and once out; q, k, v, g and o; beta.
  size_t bytes() const { return 2 * state_bytes() + rows() * (5 * kDim + 1) * sizeof(Bf16); }
};

float as_float(char const* from, size_t i, size_t element) {
  if (element == 4) {
    float x;
    std::memcpy(&x, from + 4 * i, 4);
    return x;
  }
  Bf16 x;
  std::memcpy(&x, from + 2 * i, 2);
  return kda::to_float(x);
}

std::vector<char> normal_pattern(size_t element, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<char> bytes(kPatternElements * element);
  for (size_t i = 0; i < kPatternElements; ++i) {
    float const x = normal(generator);
    Bf16 const rounded = kda::from_float<Bf16>(x);
    if (element == 4) std::memcpy(&bytes[4 * i], &x, 4);
    else std::memcpy(&bytes[2 * i], &rounded, 2);
  }
  return bytes;
}

/// The memory of a configuration: `sets` sets of inputs, states and outputs.
class Problem {
 public:
  Problem(Config const& c, int sets)
      : config(c),
        q(sets * c.rows() * kDim * 2),
        k(q.bytes()),
        v(q.bytes()),
        g(q.bytes()),
        o(q.bytes()),
        beta(sets * c.rows() * 2),
        A_log(c.heads * 4),
        dt_bias(c.heads * kDim * 4),
        state(sets * c.state_bytes()),
        slots(sets * c.batch * 4) {
    DeviceBuffer* const streams[] = {&q, &k, &v, &g, &beta};
    for (unsigned i = 0; i < 5; ++i) streams[i]->fill(normal_pattern(2, i));
    A_log.fill(normal_pattern(4, 5)), dt_bias.fill(normal_pattern(4, 6));
    state.fill(normal_pattern(c.element(), 7));
    std::vector<int32_t> order(size_t(sets) * c.batch);  // the sequences of a set have scattered slots
    for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(8));
    check(cudaMemcpy(slots.at(), order.data(), slots.bytes(), cudaMemcpyHostToDevice), "upload");
  }

  kda::DecodeParams params(int set) const {
    int64_t const row = int64_t(config.heads) * kDim;
    size_t const first = size_t(set) * config.rows();
    kda::RowStrides const strides{config.tokens * row, row, kDim};
    kda::DecodeParams p{};
    p.q = q.at(first * kDim * 2), p.k = k.at(first * kDim * 2), p.v = v.at(first * kDim * 2);
    p.g = g.at(first * kDim * 2), p.o = o.at(first * kDim * 2), p.beta = beta.at(first * 2);
    p.q_strides = p.k_strides = p.v_strides = p.g_strides = p.o_strides = strides;
    p.beta_strides = {int64_t(config.tokens) * config.heads, config.heads, 1};
    p.dtype = kda::Dtype::kBfloat16;
    p.tokens = config.tokens, p.sequences = config.batch;
    p.heads = p.value_heads = config.heads, p.key_dim = p.value_dim = kDim;
    p.scale = 1 / std::sqrt(float(kDim));
    p.l2norm = p.beta_sigmoid = p.value_first = true;
    p.gate = {kda::GateKind::kSoftplus, A_log.at<float const>(), dt_bias.at<float const>(), 0.f};
    p.state_dtype = config.state_dtype;
    kda::Indices const slot_of{slots.at(size_t(set) * config.batch * 4), false, 1, 1};
    p.state = p.new_state = {state.at(), int64_t(state.bytes() / (row * kDim * config.element())), row * kDim, slot_of};
    return p;
  }

  Config config;
  DeviceBuffer q, k, v, g, o, beta, A_log, dt_bias, state, slots;
};

/// Elements [first, first + count) of a buffer, as double.
std::vector<double> download(DeviceBuffer const& from, size_t first, size_t count, size_t element) {
  std::vector<char> bytes(count * element);
  check(cudaMemcpy(bytes.data(), from.at(first * element), bytes.size(), cudaMemcpyDeviceToHost), "download");
  std::vector<double> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = as_float(bytes.data(), i, element);
  return x;
}

double norm(std::vector<double> const& x) {
  double sum = 0;
  for (double y : x) sum += y * y;
  return std::sqrt(sum);
}
double relative_error(std::vector<double> x, std::vector<double> const& truth) {
  for (size_t i = 0; i < x.size(); ++i) x[i] -= truth[i];
  return norm(x) / norm(truth);
}

/// The recurrence of one head of one sequence in double: brings `state` [V][K] forward, returns o [tokens][V].
std::vector<double> recurrence(Problem const& x, int sequence, int head, std::vector<double>& state) {
  Config const& c = x.config;
  double const A = std::exp(download(x.A_log, head, 1, 4)[0]);
  std::vector<double> const bias = download(x.dt_bias, size_t(head) * kDim, kDim, 4);
  std::vector<double> outputs;
  for (int t = 0; t < c.tokens; ++t) {
    size_t const row = (size_t(sequence) * c.tokens + t) * c.heads + head;
    auto q = download(x.q, row * kDim, kDim, 2), k = download(x.k, row * kDim, kDim, 2);
    auto const v = download(x.v, row * kDim, kDim, 2), g = download(x.g, row * kDim, kDim, 2);
    double const beta = 1 / (1 + std::exp(-download(x.beta, row, 1, 2)[0]));
    double const q_norm = std::sqrt(norm(q) * norm(q) + 1e-6), k_norm = std::sqrt(norm(k) * norm(k) + 1e-6);
    for (int d = 0; d < kDim; ++d) q[d] /= q_norm, k[d] /= k_norm;
    for (int j = 0; j < kDim; ++j) {
      double on_key = 0, o = 0;
      for (int d = 0; d < kDim; ++d) {
        double& s = state[size_t(j) * kDim + d];
        s *= std::exp(-A * std::log1p(std::exp(g[d] + bias[d])));
        on_key += s * k[d];
      }
      for (int d = 0; d < kDim; ++d) {
        double& s = state[size_t(j) * kDim + d];
        s += k[d] * beta * (v[j] - on_key);
        o += s * q[d];
      }
      outputs.push_back(o / std::sqrt(double(kDim)));
    }
  }
  return outputs;
}

/// Runs set 0 once and compares some heads with the recurrence; throws where they differ.
double verify(Problem const& x, cudaStream_t stream) {
  Config const& c = x.config;
  std::vector<int32_t> slots(c.batch);
  check(cudaMemcpy(slots.data(), x.slots.at(), slots.size() * 4, cudaMemcpyDeviceToHost), "download");
  constexpr size_t kState = size_t(kDim) * kDim;
  std::pair<int, int> const places[] = {{0, 0}, {c.batch / 2, c.heads / 2}, {c.batch - 1, c.heads - 1}};
  std::vector<std::vector<double>> states;
  auto const state_at = [&](std::pair<int, int> at) {
    return (size_t(slots[at.first]) * c.heads + at.second) * kState;
  };
  for (auto at : places) states.push_back(download(x.state, state_at(at), kState, c.element()));
  check(cudaMemset(x.o.at(), 0xFF, x.o.bytes()), "poison");
  kda::decode(x.params(0), stream);
  check(cudaStreamSynchronize(stream), "kda::decode");
  double worst = 0;
  for (int i = 0; i < 3; ++i) {
    auto const [sequence, head] = places[i];
    std::vector<double> const truth = recurrence(x, sequence, head, states[i]);
    std::vector<double> o;
    for (int t = 0; t < c.tokens; ++t) {
      auto const row = download(x.o, ((size_t(sequence) * c.tokens + t) * c.heads + head) * kDim, kDim, 2);
      o.insert(o.end(), row.begin(), row.end());
    }
    double const state_error = relative_error(download(x.state, state_at(places[i]), kState, c.element()), states[i]);
    double const limit = c.element() == 4 ? 1e-5 : 1e-2;
    if (!(state_error <= limit)) throw std::runtime_error("wrong state: error " + std::to_string(state_error));
    worst = std::max(worst, relative_error(o, truth));
  }
  if (!(worst <= 1e-2)) throw std::runtime_error("wrong output: error " + std::to_string(worst));
  return worst;
}

void decode(benchmark::State& run, Config const& config) {
  cudaStream_t const stream = Device::get().stream;
  size_t const sets = bench::sets_of(config.bytes(), 512);
  Problem const problem(config, int(sets));
  double const error = verify(problem, stream);

  std::vector<kda::DecodeParams> params;
  for (size_t i = 0; i < sets; ++i) params.push_back(problem.params(int(i)));
  bench::Graph const steps(stream, int(sets), [&](int i) { kda::decode(params[i], stream); });
  double const us = bench::time_beside_copies(run, steps, config.bytes());
  run.counters["tb_per_s"] = double(config.bytes()) / us * 1e-6, run.counters["error"] = error;
}

void register_all() {
  for (kda::Dtype dtype : {kda::Dtype::kFloat32, kda::Dtype::kBfloat16})
    for (int heads : {8, 32, 64})
      for (int tokens : {1, 4, 8})
        for (int batch = 1; batch <= 512; batch *= 2) {
          std::string const name = std::string("decode/state:") + (dtype == kda::Dtype::kFloat32 ? "fp32" : "bf16") +
                                   "/heads:" + std::to_string(heads) + "/tokens:" + std::to_string(tokens) +
                                   "/batch:" + std::to_string(batch);
          bench::add(name, Config{dtype, batch, heads, tokens}, decode);
        }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  return bench::run("bench_decode", argc, argv);
}
