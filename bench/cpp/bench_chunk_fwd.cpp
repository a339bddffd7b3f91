// The chunkwise forward through the core's launch, over the shapes and the two gate regimes of bench/python/shapes.py:
// microseconds of a call and of each of its kernels inside a CUDA graph, bytes, tokens, and the share of what a copy of
// the same bytes reaches by turns with it. Every configuration is verified against the recurrence in double before it
// is timed; inputs rotate through more memory than the L2 holds. No torch.
//
//   bench_chunk_fwd [--benchmark_filter=bf16_k128/T8192] [--benchmark_out=FILE --benchmark_out_format=json]
#include <algorithm>
#include <cmath>

#include "bench/cpp/chunk_inputs.h"
#include "kda/chunk_fwd/dispatch.h"

namespace {

using bench::check;
using bench::Config;
using bench::Device;
using bench::DeviceBuffer;
using bench::even;
using bench::Regime;
using bench::relative_error;
using bench::Shape;
using kda::Dtype;

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

size_t state_bytes(Config const& c) {
  return size_t(c.shape.sequences()) * c.shape.heads * c.dim * c.dim * sizeof(float);
}
/// What a call must move: q, k, v, g, beta in; o and the final states out.
size_t bytes(Config const& c) { return c.rows() * (5 * c.dim + 1) * c.element() + state_bytes(c); }

/// The memory of a configuration: `sets` sets of inputs and outputs, and the workspace of one call.
struct Problem : bench::Inputs {
  kda::ChunkFwdVariant const& variant;
  kda::ChunkFwdSchedule const schedule;
  DeviceBuffer o, final_state, workspace;

  Problem(Config const& c, int sets, kda::ChunkFwdVariant const& chosen)
      : Inputs(c, sets),
        variant(chosen),
        schedule(schedule_chunk_fwd(chosen, kda::ChunkFwdCall(sizes<kda::ChunkFwdParams>(chosen.chunk)),
                                    kda::device_traits())),
        o(sets * c.rows() * c.dim * c.element()),
        final_state(sets * state_bytes(c)),
        workspace(schedule.workspace.bytes()) {}

  kda::ChunkFwdParams call(int set) const {
    int const heads = config.shape.heads, dim = config.dim;
    auto p = params<kda::ChunkFwdParams>(variant.chunk, set);
    p.o = rows(o, set);
    p.final_state = {final_state.at(set * state_bytes(config)),
                     {{}, config.shape.sequences(), false},
                     int64_t(heads) * dim * dim,
                     kda::Dtype::kFloat32,
                     true};
    p.clear_unowned = p.plan.cu_seqlens != nullptr;  // as the op does
    p.workspace = workspace.at();
    return p;
  }
  void launch(int set, cudaStream_t stream) const { variant.launch(call(set), schedule, stream); }
};

/// Some columns of V of one head of one sequence; the recurrence never mixes columns.
struct Sample {
  int sequence, head;
  std::vector<int> columns;
};

struct Outputs {
  std::vector<double> o, state;  // [tokens][columns], [columns][K]
};

/// The recurrence in double: S <- S Diag(exp g); S <- S + beta (v - S k) k^T; o = scale S q.
Outputs recurrence(Problem const& x, Sample const& sample) {
  int const dim = x.config.dim, columns = int(sample.columns.size());
  Outputs out{{}, std::vector<double>(size_t(columns) * dim)};
  for (int t = x.bounds[sample.sequence]; t < x.bounds[sample.sequence + 1]; ++t) {
    bench::Token const token = x.token(t, sample.head);
    for (int j = 0; j < columns; ++j) {
      double* const state = &out.state[size_t(j) * dim];
      double on_key = 0, o = 0;
      for (int d = 0; d < dim; ++d) state[d] *= token.decay[d], on_key += state[d] * token.k[d];
      double const change = token.beta * (x.v[x.row_of(t, sample.head) * dim + sample.columns[j]] - on_key);
      for (int d = 0; d < dim; ++d) state[d] += token.k[d] * change, o += state[d] * token.q[d];
      out.o.push_back(o * x.config.scale());
    }
  }
  return out;
}

/// What the kernels wrote of set 0 for the same sample.
Outputs computed(Problem const& x, Sample const& sample) {
  Config const& c = x.config;
  int const begin = x.bounds[sample.sequence], tokens = x.bounds[sample.sequence + 1] - begin;
  bench::Elements const o = x.of_head(x.o, sample.head, begin, begin + tokens, c.dim);
  std::vector<float> state(size_t(c.dim) * c.dim);
  size_t const at = (size_t(sample.sequence) * c.shape.heads + sample.head) * state.size();
  check(cudaMemcpy(state.data(), x.final_state.at(at * 4), state.size() * 4, cudaMemcpyDeviceToHost), "download");
  Outputs out;
  for (int t = 0; t < tokens; ++t)
    for (int j : sample.columns) out.o.push_back(o[size_t(t) * c.dim + j]);
  for (int j : sample.columns)
    for (int d = 0; d < c.dim; ++d) out.state.push_back(state[size_t(j) * c.dim + d]);
  return out;
}

/// Runs set 0 on poisoned outputs and compares samples with the recurrence; throws where they differ.
double verify(Problem const& x, cudaStream_t stream) {
  Config const& c = x.config;
  check(cudaMemset(x.o.at(), 0xFF, x.o.bytes()), "poison");
  check(cudaMemset(x.final_state.at(), 0xFF, x.final_state.bytes()), "poison");
  x.launch(0, stream);
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
  kda::ChunkFwdVariant const* const variant = kda::select_chunk_fwd(config.dtype, config.dim, 64, kda::device_traits());
  if (!variant) throw std::runtime_error("no variant fits this device");
  int const sets = int(bench::sets_of(bytes(config), 64));
  Problem const problem(config, sets, *variant);
  double const error = verify(problem, stream);

  bench::Graph const calls(stream, sets, [&](int i) { problem.launch(i, stream); });
  double const us = bench::time_beside_copies(run, calls, bytes(config));
  run.counters["error"] = error, run.counters["tokens_per_s"] = 1e6 * config.shape.tokens / us;
  bench::time_kernels(run, calls);
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
  for (Config const& config : configs) bench::add("chunk_fwd/" + config.name(), config, chunk_fwd);
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  return bench::run("bench_chunk_fwd", argc, argv);
}
