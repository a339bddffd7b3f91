// The chunkwise backward through the core's launch, over the core shapes and the two gate regimes of
// bench/python/shapes.py: microseconds of a call and of each of its kernels inside a CUDA graph, bytes, tokens, and the
// share of what a copy of the same bytes reaches by turns with it. Some calls want a part of the gradients only. Every
// configuration is verified on two heads against the recurrence in double, differentiated by hand, before it is timed;
// inputs rotate through more memory than the L2 holds. No torch.
//
//   bench_chunk_bwd [--benchmark_filter=T8192.*/of_v] [--benchmark_out=FILE --benchmark_out_format=json]
#include <algorithm>
#include <cmath>
#include <future>
#include <map>

#include "bench/cpp/chunk_inputs.h"
#include "kda/chunk_bwd/dispatch.h"

namespace {

using bench::check;
using bench::Device;
using bench::DeviceBuffer;
using bench::even;
using bench::Regime;
using bench::Shape;

std::vector<Shape> shapes() {
  return {even(2048, 16, 1), even(4096, 8, 1),  even(4096, 16, 1), even(8192, 12, 4), even(8192, 16, 1),
          even(8192, 32, 1), even(8192, 64, 1), even(8192, 64, 8), even(16384, 16, 8)};
}

/// The gradients that a call wants; kAll: those of q, k, v, g, beta, A_log and dt_bias.
enum class Wanted { kAll, kNoGate, kValues };
bool wants_keys(Wanted wanted) { return wanted != Wanted::kValues; }
bool wants_gate(Wanted wanted) { return wanted == Wanted::kAll; }

struct Config : bench::Config {
  Wanted wanted;

  /// What a call must move: q, k, v, g, beta and do in; the gradients of tokens that are wanted out.
  size_t bytes() const {
    size_t const columns = size_t(dim) * (6 + 2 * wants_keys(wanted) + wants_gate(wanted));
    size_t const scalars = 1 + wants_keys(wanted);
    return rows() * (columns + scalars) * element();
  }
  std::string name() const {
    char const* const kParts[] = {"", "/of_q_k_v_beta", "/of_v"};
    return "chunk_bwd/" + bench::Config::name() + kParts[int(wanted)];
  }
};

/// The memory of a configuration: `sets` sets of inputs and gradients, and the workspace of one call.
struct Problem : bench::Inputs {
  Wanted const wanted;
  kda::ChunkBwdVariant const& variant;
  kda::ChunkBwdSchedule const schedule;
  bench::Stream d_o;
  DeviceBuffer dq, dk, dv, dg, dbeta, dA_log, ddt_bias;  // the last two: of one set
  DeviceBuffer w, l;                                     // where there is no dk and no dq to hold them
  DeviceBuffer workspace;

  Problem(Config const& c, int sets, kda::ChunkBwdVariant const& chosen)
      : Inputs(c, sets),
        wanted(c.wanted),
        variant(chosen),
        schedule(schedule_chunk_bwd(chosen, sizes<kda::ChunkBwdParams>(chosen.chunk).plan, c.shape.heads, c.dim,
                                    kda::device_traits())),
        d_o(sets * c.rows() * c.dim, c.dtype, 1, 6),
        dq(wants_keys(wanted) * sets * c.rows() * c.dim * c.element()),
        dk(dq.bytes()),
        dv(sets * c.rows() * c.dim * c.element()),
        dg(wants_gate(wanted) * dv.bytes()),
        dbeta(wants_keys(wanted) * sets * c.rows() * c.element()),
        dA_log(A_log_on_device.bytes()),
        ddt_bias(dt_bias_on_device.bytes()),
        w(!wants_keys(wanted) * c.rows() * c.dim * c.element()),
        l(!wants_keys(wanted) * c.rows() * chosen.chunk * c.element()),
        workspace(schedule.workspace_bytes) {}

  kda::ChunkBwdParams call(int set) const {
    auto p = params<kda::ChunkBwdParams>(variant.chunk, set);
    p.d_o = rows(d_o.on_device, set), p.dv = rows(dv, set);
    if (wants_keys(wanted)) p.dq = rows(dq, set), p.dk = rows(dk, set), p.dbeta = scalars(dbeta, set);
    else p.w = rows(w, 0), p.l = rows_of_l();
    if (wants_gate(wanted)) p.dg = rows(dg, set), p.dA_log = dA_log.at<float>(), p.ddt_bias = ddt_bias.at<float>();
    p.workspace = workspace.at();
    return p;
  }
  kda::Rows rows_of_l() const {
    int64_t const heads = config.shape.heads, chunk = variant.chunk;
    return {l.at(), {int64_t(config.rows()) * chunk, heads * chunk, chunk}, config.dtype == kda::Dtype::kFloat32, true};
  }
  void launch(int set, cudaStream_t stream) const { variant.launch(call(set), schedule, stream); }
};

// ---- the gradients of one head in double -------------------------------------------------------------------------

using Vector = std::vector<double>;

/// Of one head: [tokens][dim], [tokens], [dim]. The gate's parameters add up over the tokens.
struct Gradients {
  Vector q, k, v, g, beta, dt_bias;
  double A_log = 0, A_log_size = 0;  // and the sum of the sizes of what tokens add

  Gradients(size_t tokens, size_t dim)
      : q(tokens * dim), k(tokens * dim), v(tokens * dim), g(tokens * dim), beta(tokens), dt_bias(dim) {}
};

/// S [K][V] with what the recurrence does to it and to its gradient.
struct State {
  int dim;
  Vector s = Vector(size_t(dim) * dim);

  void decay(Vector const& by) {
    for (int d = 0; d < dim; ++d)
      for (int j = 0; j < dim; ++j) s[d * dim + j] *= by[d];
  }
  void add_outer(Vector const& k, Vector const& v, double scale) {
    for (int d = 0; d < dim; ++d)
      for (int j = 0; j < dim; ++j) s[d * dim + j] += scale * k[d] * v[j];
  }
  /// S^T k
  Vector read(Vector const& k) const {
    Vector sum(dim);
    for (int d = 0; d < dim; ++d)
      for (int j = 0; j < dim; ++j) sum[j] += k[d] * s[d * dim + j];
    return sum;
  }
  /// to += scale S v
  void add_product(double* to, Vector const& v, double scale) const {
    for (int d = 0; d < dim; ++d) to[d] += scale * row_dot(d, v.data());
  }
  double row_dot(int d, double const* v) const {
    double sum = 0;
    for (int j = 0; j < dim; ++j) sum += s[d * dim + j] * v[j];
    return sum;
  }
};

double dot(double const* x, double const* y, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

/// The recurrence of one head forward and back:
///     S <- Diag(decay) S      S <- S + k u^T, u = beta e, e = v - S^T k      o = scale S^T q
class Differentiation {
 public:
  Differentiation(Problem const& problem, int head)
      : x_(problem),
        head_(head),
        dim_(problem.config.dim),
        d_(size_t(problem.config.shape.tokens), size_t(problem.config.dim)) {
    for (int n = 0; n < problem.config.shape.sequences(); ++n)
      differentiate_sequence(problem.bounds[n], problem.bounds[n + 1]);
  }
  Gradients const& gradients() const { return d_; }

 private:
  static constexpr int kKept = 64;  // tokens from one state that is kept to the next

  struct Step {
    bench::Token token;
    State decayed;  // S before it is written to
    Vector error;   // e
  };

  void differentiate_sequence(int begin, int end) {
    std::vector<State> kept;
    State state{dim_}, d_state{dim_};
    for (int t = begin; t < end; ++t) {
      if ((t - begin) % kKept == 0) kept.push_back(state);
      (void)forward(state, t);
    }
    for (; !kept.empty(); kept.pop_back()) {
      int const first = begin + (int(kept.size()) - 1) * kKept;
      std::vector<Step> steps;
      for (int t = first; t < std::min(first + kKept, end); ++t) steps.push_back(forward(kept.back(), t));
      for (; !steps.empty(); steps.pop_back()) back(d_state, steps.back(), first + int(steps.size()) - 1);
    }
  }

  Step forward(State& state, int t) const {
    bench::Token token = x_.token(t, head_);
    state.decay(token.decay);
    State decayed = state;
    Vector error = state.read(token.k);
    for (int j = 0; j < dim_; ++j) error[j] = x_.v[at(t) + j] - error[j];
    state.add_outer(token.k, error, token.beta);
    return {std::move(token), std::move(decayed), std::move(error)};
  }

  void back(State& d_state, Step const& step, int t) {
    auto const& [token, decayed, error] = step;
    double const scale = x_.config.scale();
    size_t const to = size_t(t) * dim_;
    Vector d_o(dim_);
    for (int j = 0; j < dim_; ++j) d_o[j] = x_.d_o[at(t) + j];
    decayed.add_product(&d_.q[to], d_o, scale);
    double const u_d_o = token.beta * dot(error.data(), d_o.data(), dim_);
    for (int d = 0; d < dim_; ++d) d_.q[to + d] += scale * u_d_o * token.k[d];
    d_state.add_outer(token.q, d_o, scale);

    Vector const d_u = d_state.read(token.k);
    d_.beta[t] = token.beta * (1 - token.beta) * dot(d_u.data(), error.data(), dim_);  // through the sigmoid
    Vector d_v = d_u;
    for (double& v : d_v) v *= token.beta;
    std::copy(d_v.begin(), d_v.end(), &d_.v[to]);
    d_state.add_product(&d_.k[to], error, token.beta);
    decayed.add_product(&d_.k[to], d_v, -1);
    d_state.add_outer(token.k, d_v, -1);

    differentiate_gate(d_state, decayed, t);
    d_state.decay(token.decay);
    through_norm(&d_.q[to], token.q, token.q_norm), through_norm(&d_.k[to], token.k, token.k_norm);
  }

  void differentiate_gate(State const& d_state, State const& decayed, int t) {
    double of_A_log = 0;
    for (int d = 0; d < dim_; ++d) {
      double const d_decay = d_state.row_dot(d, &decayed.s[size_t(d) * dim_]);
      bench::GateAt const gate = x_.gate_at(t, head_, d);
      d_.g[size_t(t) * dim_ + d] = d_decay * gate.by_gate, d_.dt_bias[d] += d_decay * gate.by_gate;
      of_A_log += d_decay * gate.by_A_log;
    }
    d_.A_log += of_A_log, d_.A_log_size += std::abs(of_A_log);
  }

  /// From y = x / norm to x.
  void through_norm(double* d, Vector const& y, double norm) const {
    double const along = dot(d, y.data(), dim_);
    for (int i = 0; i < dim_; ++i) d[i] = (d[i] - along * y[i]) / norm;
  }
  size_t at(int t) const { return x_.row_of(t, head_) * dim_; }

  Problem const& x_;
  int const head_, dim_;
  Gradients d_;
};

// ---- verification ------------------------------------------------------------------------------------------------

/// Of the first and the last head of set 0. Calls that want other gradients of the same inputs share them.
std::map<int, Gradients> const& truths_of(Problem const& x) {
  static std::string known;
  static std::map<int, Gradients> truths;
  if (known == x.config.name()) return truths;
  std::map<int, std::future<Gradients>> running;
  for (int head : {0, x.config.shape.heads - 1})
    running[head] = std::async(std::launch::async, [&x, head] { return Differentiation(x, head).gradients(); });
  truths.clear();
  for (auto& [head, gradients] : running) truths.emplace(head, gradients.get());
  known = x.config.name();
  return truths;
}

/// The relative errors of the gradients of a head of set 0, by name.
std::vector<std::pair<char const*, double>> errors_of(Problem const& x, int head, Gradients const& truth) {
  bench::Config const& c = x.config;
  std::vector<std::pair<char const*, double>> errors;
  auto const add = [&](char const* name, DeviceBuffer const& from, Vector const& expected) {
    int const columns = int(expected.size() / size_t(c.shape.tokens));
    bench::Elements const got = x.of_head(from, head, 0, c.shape.tokens, columns);
    Vector ours(expected.size());
    for (size_t i = 0; i < ours.size(); ++i) ours[i] = got[i];
    errors.emplace_back(name, bench::relative_error(ours, expected));
  };
  auto const floats = [&](DeviceBuffer const& from, int count) {
    std::vector<float> got(count);
    check(cudaMemcpy(got.data(), from.at(size_t(head) * count * 4), size_t(count) * 4, cudaMemcpyDeviceToHost),
          "download");
    return Vector(got.begin(), got.end());
  };
  add("dv", x.dv, truth.v);
  if (wants_keys(x.wanted)) add("dq", x.dq, truth.q), add("dk", x.dk, truth.k), add("dbeta", x.dbeta, truth.beta);
  if (wants_gate(x.wanted)) {
    add("dg", x.dg, truth.g);
    errors.emplace_back("ddt_bias", bench::relative_error(floats(x.ddt_bias, c.dim), truth.dt_bias));
    // One number, to which tokens add what cancels. Beside the sum of the sizes the error is a tenth of the others'.
    errors.emplace_back("dA_log", 10 * std::abs(floats(x.dA_log, 1)[0] - truth.A_log) / truth.A_log_size);
  }
  return errors;
}

/// Runs set 0 on poisoned gradients and compares the first and the last head; throws where they differ.
double verify(Problem const& x, cudaStream_t stream) {
  for (DeviceBuffer const* d : {&x.dq, &x.dk, &x.dv, &x.dg, &x.dbeta, &x.dA_log, &x.ddt_bias, &x.w, &x.l, &x.workspace})
    check(cudaMemset(d->at(), 0xFF, d->bytes()), "poison");
  x.launch(0, stream);
  check(cudaStreamSynchronize(stream), "kda::chunk_bwd");
  double worst = 0;
  for (auto const& [head, truth] : truths_of(x))
    for (auto const& [name, error] : errors_of(x, head, truth)) {
      if (!(error <= 3 * x.config.error_limit()))
        throw std::runtime_error(std::string("wrong ") + name + " of head " + std::to_string(head) + ": error " +
                                 std::to_string(error));
      worst = std::max(worst, error);
    }
  return worst;
}

void chunk_bwd(benchmark::State& run, Config const& config) {
  cudaStream_t const stream = Device::get().stream;
  kda::ChunkBwdVariant const* const variant = kda::select_chunk_bwd(config.dtype, config.dim, kda::device_traits());
  if (!variant) throw std::runtime_error("no variant fits this device");
  int const sets = int(bench::sets_of(config.bytes(), 64));
  Problem const problem(config, sets, *variant);
  double const error = verify(problem, stream);

  bench::Graph const calls(stream, sets, [&](int i) { problem.launch(i, stream); });
  double const us = bench::time_beside_copies(run, calls, config.bytes());
  run.counters["error"] = error, run.counters["tokens_per_s"] = 1e6 * config.shape.tokens / us;
  run.counters["rounds"] = problem.schedule.rounds;
  run.counters["workspace_bytes"] = double(problem.schedule.workspace_bytes);
  bench::time_kernels(run, calls);
  run.SetLabel(variant->name);
}

void register_all() {
  for (Shape const& shape : shapes())
    for (auto const& [regime, wanted] :
         {std::pair(Regime::kFast, Wanted::kAll), std::pair(Regime::kLong, Wanted::kAll),
          std::pair(Regime::kLong, Wanted::kNoGate), std::pair(Regime::kLong, Wanted::kValues)}) {
      Config const config{{shape, regime, kda::Dtype::kBfloat16, 128}, wanted};
      bench::add(config.name(), config, chunk_bwd);
    }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  return bench::run("bench_chunk_bwd", argc, argv);
}
