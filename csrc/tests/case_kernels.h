// Calls the kernels on a case, the way csrc/torch does: one function for each family.
#pragma once
#include <algorithm>
#include <functional>

#include "kda/chunk_fwd/dispatch.h"
#include "kda/decode/dispatch.h"
#include "kda/kda_gate/dispatch.h"
#include "tests/case_file.h"

namespace kda::tests {

/// A kernel family, or a variant of it, on one case: `run` gives the outputs by name.
struct CaseRun {
  std::string kernel;
  std::function<std::map<std::string, CaseTensor>()> run;
  std::map<std::string, CaseTensor> truth;
  std::map<std::string, std::pair<double, double>> budget;  // relative RMS error, worst row
};

inline Dtype kernel_dtype(CaseTensor const& x) { return Dtype(x.dtype); }
inline char const* dtype_name(FileDtype dtype) {
  constexpr char const* kNames[] = {"fp32", "fp16", "bf16"};
  return kNames[size_t(dtype)];
}

/// [batch, tokens, heads] or [batch, tokens, heads, columns], contiguous.
inline RowStrides row_strides(CaseTensor const& x) {
  int64_t const columns = x.shape.size() == 4 ? x.shape[3] : 1;
  return {x.shape[1] * x.shape[2] * columns, x.shape[2] * columns, columns};
}

inline GateParams gate_params(CaseFile const& c) {
  GateKind const kind = !c.scalar("use_gate")  ? GateKind::kLogDecay
                        : c.has("lower_bound") ? GateKind::kBounded
                                               : GateKind::kSoftplus;
  return {kind, c.pointer_or_null<float const>("A_log"), c.pointer_or_null<float const>("dt_bias"),
          c.has("lower_bound") ? float(c.scalar("lower_bound")) : 0.f};
}

inline int64_t sequences_of(CaseFile const& c) {
  return c.has("cu_seqlens") ? c["cu_seqlens"].elements() - 1 : c["q"].shape[0];
}
inline std::vector<int64_t> state_shape(CaseFile const& c) {
  int64_t const key_dim = c["q"].shape[3], value_dim = c["v"].shape[3];
  bool const value_first = c.scalar("state_v_first") != 0;
  return {sequences_of(c), c["v"].shape[2], value_first ? value_dim : key_dim, value_first ? key_dim : value_dim};
}

inline Rows rows_of(CaseTensor const& x) {
  bool const in_pieces = x.shape.size() == 4 && x.shape[3] * bytes_of_dtype(x.dtype) % 16 == 0;
  return {x.data(), row_strides(x), x.dtype == FileDtype::kFloat32, in_pieces};
}
inline void set_rows(ChunkInputs& p, CaseTensor const& q, CaseTensor const& k, CaseTensor const& v, CaseTensor const& g,
                     CaseTensor const& beta) {
  p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v), p.g = rows_of(g), p.beta = rows_of(beta);
}
inline void set_rows(ChunkFwdParams& p, CaseTensor const& q, CaseTensor const& k, CaseTensor const& v,
                     CaseTensor const& g, CaseTensor const& beta, CaseTensor const& o) {
  set_rows(static_cast<ChunkInputs&>(p), q, k, v, g, beta);
  p.o = rows_of(o);
}
inline void set_rows(DecodeParams& p, CaseTensor const& q, CaseTensor const& k, CaseTensor const& v,
                     CaseTensor const& g, CaseTensor const& beta, CaseTensor const& o) {
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.g = g.data(), p.beta = beta.data(), p.o = o.data();
  p.q_strides = p.k_strides = row_strides(q), p.v_strides = p.o_strides = row_strides(v);
  p.g_strides = row_strides(g), p.beta_strides = row_strides(beta);
  p.g_is_fp32 = g.dtype == FileDtype::kFloat32, p.beta_is_fp32 = beta.dtype == FileDtype::kFloat32;
}

/// What all operations have in common. The streams are the entries that begin with `prefix`.
template <class Params>
void set_streams(Params& p, CaseFile const& c, CaseTensor const& o, std::string const& prefix = "") {
  CaseTensor const &q = c[prefix + "q"], &v = c[prefix + "v"], &g = c[prefix + "g"], &beta = c[prefix + "beta"];
  set_rows(p, q, c[prefix + "k"], v, g, beta, o);
  p.heads = int32_t(q.shape[2]), p.value_heads = int32_t(v.shape[2]);
  p.key_dim = int32_t(q.shape[3]), p.value_dim = int32_t(v.shape[3]);
  p.scale = float(c.scalar("scale"));
  p.l2norm = c.scalar("use_qk_l2norm") != 0, p.beta_sigmoid = c.scalar("use_beta_sigmoid") != 0;
  p.neg_eigval = c.scalar("allow_neg_eigval") != 0;
  p.gate = gate_params(c);
}

inline void add_truth(CaseRun& run, CaseFile const& c, std::string const& name) {
  run.truth.emplace(name, c["truth." + name]);
  run.budget.emplace(name, std::pair(c["budget." + name][0], c["budget." + name][1]));
}

// ---- chunk_fwd -------------------------------------------------------------------------------------------------

inline StateRef state_ref(CaseFile const& c, CaseTensor const& x) {
  int64_t const slot = x.shape[1] * x.shape[2] * x.shape[3];
  return {x.data(), {{}, x.shape[0], false}, slot, kernel_dtype(x), c.scalar("state_v_first") != 0};
}

inline void set_plan(ChunkCall& p, CaseFile const& c, int chunk, int64_t sequences) {
  p.plan.tokens = c["q"].shape[1], p.plan.sequences = int32_t(sequences), p.plan.chunk = chunk;
  p.plan.cu_seqlens = c.pointer_or_null<void>("cu_seqlens");
  p.plan.cu_seqlens_is_int64 = c.has("cu_seqlens") && c["cu_seqlens"].dtype == FileDtype::kInt64;
}
/// Everything but states, and no workspace yet, for the first `sequences` sequences.
inline ChunkFwdParams chunk_fwd_params(CaseFile const& c, CaseTensor const& o, ChunkFwdVariant const& variant,
                                       int64_t sequences) {
  ChunkFwdParams p{};
  set_streams(p, c, o);
  set_plan(p, c, variant.chunk, sequences);
  return p;
}
/// In a poisoned workspace of the size that it asks for.
inline void launch_chunk_fwd(ChunkFwdParams& p, ChunkFwdVariant const& variant) {
  ChunkFwdSchedule const schedule = schedule_chunk_fwd(variant, ChunkFwdCall(p), device_traits());
  Buffer<char> const workspace(std::vector<char>(schedule.workspace.bytes(), char(0xFF)));
  p.workspace = workspace.data();
  variant.launch(p, schedule, nullptr);
}

inline std::map<std::string, CaseTensor> run_chunk_fwd(CaseFile const& c, ChunkFwdVariant const& variant) {
  CaseTensor const o(c["v"].dtype, c["v"].shape), final_state(FileDtype::kFloat32, state_shape(c)),
      h(c["q"].dtype, c["truth.h"].shape);
  ChunkFwdParams p = chunk_fwd_params(c, o, variant, sequences_of(c));
  if (c.has("initial_state")) p.initial_state = state_ref(c, c["initial_state"]);
  p.final_state = state_ref(c, final_state);
  p.chunk_states = state_ref(c, h);
  p.chunk_state_tokens = int32_t(c.scalar("chunk_size"));
  launch_chunk_fwd(p, variant);
  return {{"o", o}, {"final_state", final_state}, {"h", h}};
}

template <class Variant>
bool serves(Variant const& variant, CaseFile const& c) {
  int const key_tile = key_tile_of(int(c["q"].shape[3]));
  return variant.dtype == kernel_dtype(c["q"]) && variant.key_tile == key_tile &&
         int(c.scalar("chunk_size")) % variant.chunk == 0;
}
/// Every variant of `variants` that could serve the case.
inline void add_chunk_fwd(std::vector<CaseRun>& runs, CaseFile const& c, std::vector<ChunkFwdVariant> const& variants) {
  for (ChunkFwdVariant const& variant : variants) {
    if (!serves(variant, c)) continue;
    CaseRun run{std::string("chunk_fwd ") + variant.name, [&c, &variant] { return run_chunk_fwd(c, variant); }, {}, {}};
    for (char const* name : {"o", "final_state", "h"}) add_truth(run, c, name);
    runs.push_back(std::move(run));
  }
}

// ---- decode ----------------------------------------------------------------------------------------------------

inline constexpr int64_t kMaxDecodeTokens = 32;  // of a case that decode serves: it is quick, but not that quick

/// fp32 values in another dtype of states, in memory of their own.
inline CaseTensor in_dtype(CaseTensor const& x, FileDtype dtype) {
  CaseTensor const y(dtype, x.shape);
  for (int64_t i = 0; i < x.elements(); ++i) {
    if (dtype == FileDtype::kFloat32) y.data<float>()[i] = float(x[i]);
    else if (dtype == FileDtype::kFloat16) y.data<Fp16>()[i] = from_float<Fp16>(float(x[i]));
    else y.data<Bf16>()[i] = from_float<Bf16>(float(x[i]));
  }
  return y;
}
/// The states before the first token, in the dtype of the pool; zeros where the case has none.
inline CaseTensor decode_states(CaseFile const& c, FileDtype dtype) {
  if (c.has("initial_state")) return in_dtype(c["initial_state"], dtype);
  CaseTensor const zeros(dtype, state_shape(c));
  std::memset(zeros.data(), 0, zeros.bytes().size());
  return zeros;
}
inline StatePool state_pool(CaseTensor const& x) {
  return {x.data(), x.shape[0], x.shape[1] * x.shape[2] * x.shape[3], {}};
}

/// Everything but the states that are read or written.
inline DecodeParams decode_params(CaseFile const& c, CaseTensor const& o, CaseTensor const& states) {
  DecodeParams p{};
  set_streams(p, c, o);
  p.dtype = kernel_dtype(c["q"]);
  p.tokens = c["q"].shape[1], p.sequences = int32_t(sequences_of(c));
  if (c.has("cu_seqlens")) p.cu_seqlens = {c["cu_seqlens"].data(), c["cu_seqlens"].dtype == FileDtype::kInt64, 1, 1};
  p.state_dtype = kernel_dtype(states);
  p.value_first = c.scalar("state_v_first") != 0;
  return p;
}
inline std::map<std::string, CaseTensor> run_decode(CaseFile const& c, FileDtype state) {
  CaseTensor const o(c["v"].dtype, c["v"].shape), final_state(state, state_shape(c)), states = decode_states(c, state);
  DecodeParams p = decode_params(c, o, states);
  if (c.has("initial_state")) p.state = state_pool(states);
  p.new_state = state_pool(final_state);
  decode(p, nullptr);
  return {{"o", o}, {"final_state", final_state}};
}

/// Drafts for `p`, whose tensors are like those, and what of them `accepted` says; decode, then decode_commit.
inline void verify_and_commit(DecodeParams p, CaseTensor const& q, CaseTensor const& v, CaseTensor const& g,
                              CaseTensor const& states, CaseTensor const& accepted, CaseTensor const& final_state) {
  CaseTensor const k(FileDtype::kFloat32, q.shape), u(FileDtype::kFloat32, v.shape),
      decay(FileDtype::kFloat32, g.shape);
  p.state = state_pool(states);
  p.records = {k.data<float>(), u.data<float>(), decay.data<float>()};
  decode(p, nullptr);
  p.accepted = {accepted.data(), false, 1, 1};
  p.new_state = state_pool(final_state);
  decode_commit(p, nullptr);
}
inline std::map<std::string, CaseTensor> run_commit(CaseFile const& c, FileDtype state) {
  CaseTensor const o(c["v"].dtype, c["v"].shape), final_state(state, state_shape(c)), states = decode_states(c, state);
  DecodeParams const p = decode_params(c, o, states);
  CaseTensor const accepted(FileDtype::kInt32, {p.sequences});
  std::fill_n(accepted.data<int32_t>(), p.sequences, int32_t(p.tokens));
  verify_and_commit(p, c["q"], c["v"], c["g"], states, accepted, final_state);
  return {{"o", o}, {"final_state", final_state}};
}

/// [batch, tokens, ...] with every token twice.
inline CaseTensor twice(CaseTensor const& x) {
  CaseTensor const y(x.dtype, [&] {
    std::vector<int64_t> shape = x.shape;
    shape[1] *= 2;
    return shape;
  }());
  int64_t const tokens = x.shape[0] * x.shape[1], bytes = tokens ? x.elements() / tokens * bytes_of_dtype(x.dtype) : 0;
  for (int64_t t = 0; t < 2 * tokens; ++t)
    std::memcpy(y.data<char>() + t * bytes, x.data<char>() + t / 2 * bytes, size_t(bytes));
  return y;
}
/// The case as a tree: every token twice, in two chains that cross after each. One of them is committed.
inline std::map<std::string, CaseTensor> run_tree(CaseFile const& c, FileDtype state) {
  CaseTensor const q = twice(c["q"]), k = twice(c["k"]), v = twice(c["v"]), g = twice(c["g"]), beta = twice(c["beta"]);
  CaseTensor const both(v.dtype, v.shape), o(v.dtype, c["v"].shape), final_state(state, state_shape(c)),
      states = decode_states(c, state);
  DecodeParams p = decode_params(c, both, states);
  set_rows(p, q, k, v, g, beta, both);
  p.tokens *= 2;
  CaseTensor const parents(FileDtype::kInt32, {q.shape[0], q.shape[1]}), accepted(FileDtype::kInt32, {p.sequences}),
      bounds(FileDtype::kInt32, {p.sequences + 1});
  for (int32_t n = 0; n < p.sequences; ++n) {
    bool const packed = c.has("cu_seqlens");
    int64_t const begin = packed ? 2 * int64_t(c["cu_seqlens"][n]) : n * p.tokens,
                  end = packed ? 2 * int64_t(c["cu_seqlens"][n + 1]) : begin + p.tokens;
    for (int64_t t = 0; t < end - begin; ++t)
      parents.data<int32_t>()[begin + t] = int32_t(t < 2 ? -1 : t % 2 ? t - 3 : t - 1);
    accepted.data<int32_t>()[n] = int32_t(end - begin) - 1;
    bounds.data<int32_t>()[n] = int32_t(begin), bounds.data<int32_t>()[n + 1] = int32_t(end);
  }
  p.parents = {parents.data(), false, p.tokens, int32_t(p.tokens)};
  if (p.cu_seqlens.data) p.cu_seqlens = {bounds.data(), false, 1, 1};
  verify_and_commit(p, q, v, g, states, accepted, final_state);
  int64_t const tokens = o.shape[0] * o.shape[1], bytes = tokens ? o.elements() / tokens * bytes_of_dtype(o.dtype) : 0;
  for (int64_t t = 0; t < tokens; ++t)
    std::memcpy(o.data<char>() + t * bytes, both.data<char>() + (2 * t + t % 2) * bytes, size_t(bytes));
  return {{"o", o}, {"final_state", final_state}};
}
inline constexpr FileDtype kStateDtypes[] = {FileDtype::kFloat32, FileDtype::kBfloat16, FileDtype::kFloat16};
/// What a result may be off that depends on states of 16 bits: the caps of accuracy.py.
inline void widen_for_states(std::pair<double, double>& budget, FileDtype states) {
  if (states == FileDtype::kBfloat16) budget = {1e-2, 1e-1};
  else if (states == FileDtype::kFloat16 && budget.first < 2e-3) budget = {2e-3, 2e-2};
}
inline void add_decode(std::vector<CaseRun>& runs, CaseFile const& c) {
  if (c["q"].shape[1] > kMaxDecodeTokens) return;
  std::string const tile = "_k" + std::to_string(key_tile_of(int(c["q"].shape[3])));
  std::pair<char const*, decltype(&run_decode)> const calls[] = {
      {"decode ", run_decode}, {"decode_commit ", run_commit}, {"decode_tree ", run_tree}};
  for (FileDtype const state : kStateDtypes)
    for (auto const& [kernel, call] : calls) {
      CaseRun run{kernel + (dtype_name(state) + tile), [&c, state, call = call] { return call(c, state); }, {}, {}};
      for (char const* name : {"o", "final_state"}) {
        add_truth(run, c, name);
        widen_for_states(run.budget.at(name), state);
      }
      runs.push_back(std::move(run));
    }
}

// ---- kda_gate --------------------------------------------------------------------------------------------------

inline GateTensor gate_tensor(CaseTensor const& x) {
  return {x.data(), kernel_dtype(x), {x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3], x.shape[3], 1}};
}
inline KdaGateParams gate_call(CaseFile const& c, CaseTensor const& y) {
  CaseTensor const& g = c["g"];
  KdaGateParams p{};
  p.g = gate_tensor(g), p.y = gate_tensor(y);
  p.rows0 = g.shape[0], p.rows1 = g.shape[1], p.value_heads = int32_t(g.shape[2]), p.key_dim = int32_t(g.shape[3]);
  p.gate = gate_params(c);
  return p;
}

inline std::map<std::string, CaseTensor> run_gate_fwd(CaseFile const& c) {
  CaseTensor const y(FileDtype::kFloat32, c["g"].shape);
  KdaGateParams const p = gate_call(c, y);
  select_kda_gate(p.g.dtype).fwd(p, nullptr);
  return {{"y", y}};
}
inline std::map<std::string, CaseTensor> run_gate_bwd(CaseFile const& c, CaseTensor const& dy) {
  CaseTensor const &g = c["g"], dg(g.dtype, g.shape);
  CaseTensor const dA_log(FileDtype::kFloat32, {g.shape[2]}), ddt_bias(FileDtype::kFloat32, {g.shape[2], g.shape[3]});
  KdaGateParams p = gate_call(c, dy);
  p.dg = gate_tensor(dg);
  p.row_blocks = gate_row_blocks(p.rows0 * p.rows1);
  CaseTensor const partial(FileDtype::kFloat32, {2, p.row_blocks, p.value_heads, p.key_dim});
  p.partial = partial.data<float>();
  std::map<std::string, CaseTensor> results = {{"dg", dg}};
  if (p.gate.A_log) p.dA_log = dA_log.data<float>(), results.emplace("dA_log", dA_log);
  if (p.gate.dt_bias) p.ddt_bias = ddt_bias.data<float>(), results.emplace("ddt_bias", ddt_bias);
  select_kda_gate(p.g.dtype).bwd(p, nullptr);
  return results;
}

/// The gate's equations in float64 (docs/mathematics.md, section 1), stored as fp32: y, dg, dA_log, ddt_bias.
inline std::map<std::string, CaseTensor> gate_truth(CaseFile const& c, CaseTensor const& dy) {
  CaseTensor const& g = c["g"];
  int64_t const heads = g.shape[2], channels = g.shape[3], columns = heads * channels;
  bool const bounded = c.has("lower_bound");
  std::vector<double> a_log_sum(size_t(heads), 0.), bias_sum(size_t(columns), 0.);
  CaseTensor const y(FileDtype::kFloat32, g.shape), dg(FileDtype::kFloat32, g.shape);
  for (int64_t i = 0; i < g.elements(); ++i) {
    int64_t const column = i % columns, head = column / channels;
    double const amplitude = c.has("A_log") ? std::exp(c["A_log"][head]) : 1;
    double const x = g[i] + (c.has("dt_bias") ? c["dt_bias"][column] : 0), z = bounded ? amplitude * x : x;
    double const sigmoid = 1 / (1 + std::exp(-z)), softplus = std::max(x, 0.) + std::log1p(std::exp(-std::fabs(x)));
    double const bound = bounded ? c.scalar("lower_bound") : 0;
    double const slope = bounded ? bound * sigmoid * (1 - sigmoid) * amplitude : -amplitude * sigmoid;
    y.data<float>()[i] = float(bounded ? bound * sigmoid : -amplitude * softplus);
    dg.data<float>()[i] = float(slope * dy[i]);
    a_log_sum[size_t(head)] += dy[i] * (bounded ? slope * x : -amplitude * softplus);
    bias_sum[size_t(column)] += dy[i] * slope;
  }
  CaseTensor const dA_log(FileDtype::kFloat32, {heads}), ddt_bias(FileDtype::kFloat32, {heads, channels});
  for (int64_t i = 0; i < heads; ++i) dA_log.data<float>()[i] = float(a_log_sum[size_t(i)]);
  for (int64_t i = 0; i < columns; ++i) ddt_bias.data<float>()[i] = float(bias_sum[size_t(i)]);
  return {{"y", y}, {"dg", dg}, {"dA_log", dA_log}, {"ddt_bias", ddt_bias}};
}

inline void add_gate(std::vector<CaseRun>& runs, CaseFile const& c) {
  if (!c.scalar("use_gate")) return;
  CaseTensor const dy(FileDtype::kFloat32, c["g"].shape);
  for (int64_t i = 0; i < dy.elements(); ++i) dy.data<float>()[i] = real(uint32_t(i), 16);
  auto const truth = gate_truth(c, dy);
  std::string const type = dtype_name(c["g"].dtype);
  double const rounding = c["g"].dtype == FileDtype::kFloat32 ? 1e-6 : type == "fp16" ? 1e-3 : 5e-3;
  runs.push_back({"kda_gate_fwd " + type, [&c] { return run_gate_fwd(c); }, truth, {{"y", {1e-6, 1e-5}}}});
  runs.push_back({"kda_gate_bwd " + type,
                  [&c, dy] { return run_gate_bwd(c, dy); },
                  truth,
                  {{"dg", {rounding, 10 * rounding}}, {"dA_log", {1e-5, 1e-4}}, {"ddt_bias", {1e-5, 1e-4}}}});
}

}  // namespace kda::tests
