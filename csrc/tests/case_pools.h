// The kernels that serve engines, on a case: states in pools, sequences without a slot, rows that no sequence owns.
#pragma once
#include <algorithm>

#include "kda/decode_layer/dispatch.h"
#include "tests/case_kernels.h"

namespace kda::tests {

/// In memory of its own.
inline CaseTensor copy_of(CaseTensor const& x) { return {x.dtype, x.shape, x.bytes()}; }
inline int64_t state_elements(CaseTensor const& states) { return states.elements() / states.shape[0]; }

// ---- prefill ---------------------------------------------------------------------------------------------------

/// The case as a call of prefill: all sequences but the last one of several (its rows are then nobody's), the first
/// one of several without a slot; a checkpoint after every chunk_size tokens, in the pool of the states.
class PrefillCase {
 public:
  explicit PrefillCase(CaseFile const& c) : c_(c), lengths_(sequence_lengths(c)) {
    int64_t const given = sequences_of(c);
    sequences_ = c.has("cu_seqlens") && given > 1 ? given - 1 : given;
    columns_ = std::max<int64_t>(1, *std::max_element(lengths_.begin(), lengths_.end()) / interval());
    std::vector<int64_t> shape = c["truth.final_state"].shape;
    shape[0] = sequences_ * (1 + columns_);
    pool_ = CaseTensor(FileDtype::kFloat32, shape), truth_pool_ = CaseTensor(FileDtype::kFloat32, shape);
    slots_ = CaseTensor(FileDtype::kInt32, {sequences_});
    checkpoints_ = CaseTensor(FileDtype::kInt32, {sequences_, columns_});
    truth_o_ = copy_of(c["truth.o"]);
    int64_t row = 0, token = 0;
    for (int64_t n = 0; n < given; ++n) {
      if (n < sequences_) place(n, row);
      if (n >= sequences_ || is_null(n)) clear_outputs(token, lengths_[size_t(n)]);
      token += lengths_[size_t(n)], row += (lengths_[size_t(n)] + interval() - 1) / interval();
    }
  }

  CaseRun run_of(ChunkFwdVariant const& variant) const {
    std::pair<double, double> states = limits("final_state");
    states = {std::max(states.first, limits("h").first), std::max(states.second, limits("h").second)};
    return {std::string("prefill ") + variant.name,
            [*this, &variant] { return run(variant); },
            {{"o", truth_o_}, {"pool", truth_pool_}},
            {{"o", limits("o")}, {"pool", states}}};
  }

 private:
  CaseFile const& c_;
  std::vector<int64_t> lengths_;
  int64_t sequences_, columns_;
  CaseTensor pool_, truth_pool_, slots_, checkpoints_, truth_o_;

  int64_t interval() const { return int64_t(c_.scalar("chunk_size")); }
  bool is_null(int64_t n) const { return n == 0 && sequences_ > 1; }
  std::pair<double, double> limits(std::string const& name) const {
    return {c_["budget." + name][0], c_["budget." + name][1]};
  }
  static std::vector<int64_t> sequence_lengths(CaseFile const& c) {
    std::vector<int64_t> lengths(size_t(sequences_of(c)), c["q"].shape[1]);
    if (c.has("cu_seqlens"))
      for (size_t n = 0; n < lengths.size(); ++n)
        lengths[n] = int64_t(c["cu_seqlens"][int64_t(n) + 1] - c["cu_seqlens"][int64_t(n)]);
    return lengths;
  }

  static void copy_state(CaseTensor const& to, int64_t slot, CaseTensor const& from, int64_t row) {
    int64_t const count = state_elements(to);
    for (int64_t i = 0; i < count; ++i) to.data<float>()[slot * count + i] = float(from[row * count + i]);
  }
  /// The slots of sequence n, and what they hold before and after. `row`: of its first state in truth.h.
  void place(int64_t n, int64_t row) {
    int32_t const slot = is_null(n) ? -1 : int32_t(sequences_ - 1 - n);
    slots_.data<int32_t>()[n] = slot;
    if (slot >= 0 && c_.has("initial_state")) copy_state(pool_, slot, c_["initial_state"], n);
    if (slot >= 0) copy_state(truth_pool_, slot, c_["truth.final_state"], n);
    for (int64_t j = 0; j < columns_; ++j) {
      int64_t const to = sequences_ + n * columns_ + j, tokens = (j + 1) * interval(), length = lengths_[size_t(n)];
      checkpoints_.data<int32_t>()[n * columns_ + j] = int32_t(to);
      if (slot < 0 || tokens > length) continue;
      if (tokens == length) copy_state(truth_pool_, to, c_["truth.final_state"], n);
      else copy_state(truth_pool_, to, c_["truth.h"], row + j + 1);
    }
  }
  void clear_outputs(int64_t token, int64_t count) {
    int64_t const width = truth_o_.shape[2] * truth_o_.shape[3];
    std::fill_n(truth_o_.data<float>() + token * width, count * width, 0.f);
  }

  std::map<std::string, CaseTensor> run(ChunkFwdVariant const& variant) const {
    CaseTensor const o(c_["v"].dtype, c_["v"].shape), pool = copy_of(pool_);
    ChunkFwdParams p = chunk_fwd_params(c_, o, variant, sequences_);
    p.final_state = state_ref(c_, pool);
    p.final_state.slots.index = {slots_.data(), false, 1, 1};
    p.initial_state = p.final_state, p.plan.state_slots = p.final_state.slots;
    Buffer<char> const nobody(std::vector<char>(size_t(sequences_), 0));
    if (!c_.has("initial_state")) p.has_initial_state = reinterpret_cast<bool const*>(nobody.data());
    p.checkpoints = state_ref(c_, pool);
    p.checkpoints.slots.index = {checkpoints_.data(), false, columns_, int32_t(columns_)};
    p.checkpoint_tokens = int32_t(interval());
    p.clear_unowned = true;
    launch_chunk_fwd(p, variant);
    return {{"o", o}, {"pool", pool}};
  }
};

inline void add_prefill(std::vector<CaseRun>& runs, CaseFile const& c, std::vector<ChunkFwdVariant> const& variants) {
  PrefillCase const prefill(c);
  for (ChunkFwdVariant const& variant : variants)
    if (serves(variant, c)) runs.push_back(prefill.run_of(variant));
}

// ---- decode_layer ----------------------------------------------------------------------------------------------

inline std::map<std::string, CaseTensor> run_decode_layer(CaseFile const& c, FileDtype state_dtype) {
  auto const given = [&](char const* name) -> CaseTensor const& { return c["layer." + std::string(name)]; };
  CaseTensor const& q = given("q");
  CaseTensor const o(q.dtype, q.shape), conv_state = copy_of(given("conv_state"));
  CaseTensor const state = in_dtype(given("state"), state_dtype);
  DecodeLayerParams p{};
  DecodeParams& step = p.step;
  set_streams(step, c, o, "layer.");
  step.dtype = kernel_dtype(q);
  step.tokens = 1, step.sequences = int32_t(q.shape[0]);
  step.scale = 1.f / std::sqrt(float(q.shape[3]));
  step.l2norm = step.beta_sigmoid = step.value_first = true, step.neg_eigval = false;
  step.gate = {GateKind::kSoftplus, given("A_log").data<float>(), given("dt_bias").data<float>(), 0.f};
  step.state_dtype = kernel_dtype(state);
  step.state = state_pool(state);
  step.state.slot_of = {given("slot_of").data(), false, 1, 1};
  step.new_state = step.state;
  for (int i = 0; i < 3; ++i)
    p.conv.weight[i] = given(i == 0 ? "q_conv_weight" : i == 1 ? "k_conv_weight" : "v_conv_weight").data();
  p.conv.state = conv_state.data(), p.conv.slots = conv_state.shape[0];
  p.conv.slot_stride = state_elements(conv_state), p.conv.channel_stride = kConvTaps - 1, p.conv.tap_stride = 1;
  p.conv.weight_is_fp32 = p.conv.state_is_fp32 = p.norm_weight_is_fp32 = q.dtype == FileDtype::kFloat32;
  p.output_gate = given("output_gate").data(), p.output_gate_strides = row_strides(q);
  p.norm_weight = given("norm_weight").data(), p.norm_eps = 1e-5f;
  decode_layer(p, nullptr);
  return {{"layer_o", o}, {"layer_state", state}, {"layer_conv_state", conv_state}};
}

inline void add_decode_layer(std::vector<CaseRun>& runs, CaseFile const& c) {
  if (!c.has("layer.q")) return;
  std::string const tile = "_k" + std::to_string(key_tile_of(int(c["q"].shape[3])));
  for (FileDtype const state : kStateDtypes) {
    CaseRun run{std::string("decode_layer ") + dtype_name(state) + tile,
                [&c, state] { return run_decode_layer(c, state); },
                {},
                {}};
    for (char const* name : {"layer_o", "layer_state", "layer_conv_state"}) {
      add_truth(run, c, name);
      widen_for_states(run.budget.at(name), state);
    }
    runs.push_back(std::move(run));
  }
}

}  // namespace kda::tests
