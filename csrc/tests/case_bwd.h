// chunk_bwd on a case: every gradient that the case has.
#pragma once
#include <climits>

#include "kda/chunk_bwd/dispatch.h"
#include "kda/chunk_bwd/wanted.h"
#include "tests/case_kernels.h"

namespace kda::tests {

inline void set_rows(ChunkBwdParams& p, CaseTensor const& q, CaseTensor const& k, CaseTensor const& v,
                     CaseTensor const& g, CaseTensor const& beta, CaseTensor const& d_o) {
  set_rows(static_cast<ChunkInputs&>(p), q, k, v, g, beta);
  p.d_o = rows_of(d_o);
}

/// Poisoned gradients by name, each like its argument.
inline std::map<std::string, CaseTensor> gradients_of(CaseFile const& c) {
  std::map<std::string, CaseTensor> d;
  for (std::string const argument : {"q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"})
    if (c.has(argument)) d.emplace("d" + argument, CaseTensor(c[argument].dtype, c[argument].shape));
  return d;
}

/// In rounds of at most so many value heads.
inline std::map<std::string, CaseTensor> run_chunk_bwd(CaseFile const& c, ChunkBwdVariant const& variant,
                                                       int most_heads = INT_MAX) {
  auto const d = gradients_of(c);
  ChunkBwdParams p{};
  set_streams(p, c, c["do"]);
  set_plan(p, c, variant.chunk, sequences_of(c));
  p.dv = rows_of(d.at("dv")), p.dg = rows_of(d.at("dg")), p.dbeta = rows_of(d.at("dbeta"));
  bool const grouped = p.value_heads != p.heads;
  CaseTensor const dq(FileDtype::kFloat32, c["g"].shape), dk(FileDtype::kFloat32, c["g"].shape);  // of value heads
  p.dq = rows_of(grouped ? dq : d.at("dq")), p.dk = rows_of(grouped ? dk : d.at("dk"));
  if (grouped) p.dq_sum = d.at("dq").data(), p.dk_sum = d.at("dk").data();
  ChunkBwdScratch const needs({Wanted::kOfTokens},
                              {p.key_dim, p.value_dim, variant.chunk, variant.element_bytes(), grouped});
  CaseTensor const l(c["q"].dtype, {c["g"].shape[0], c["g"].shape[1], c["g"].shape[2], variant.chunk});
  if (needs.l) p.l = rows_of(l);
  if (c.has("A_log")) p.dA_log = d.at("dA_log").data<float>();
  if (c.has("dt_bias")) p.ddt_bias = d.at("ddt_bias").data<float>();
  if (c.has("dfinal_state")) p.d_final_state = state_ref(c, c["dfinal_state"]);
  if (c.has("initial_state")) {
    p.initial_state = state_ref(c, c["initial_state"]);
    p.d_initial_state = state_ref(c, d.at("dinitial_state"));
  }
  DeviceTraits const device = device_traits();
  ChunkBwdSchedule schedule = schedule_chunk_bwd(variant, p.plan, p.value_heads, p.value_dim, device);
  if (schedule.heads_per_round > most_heads)
    schedule = schedule_rounds(variant, p.plan, p.value_heads, p.value_dim, most_heads, device);
  Buffer<char> const workspace(std::vector<char>(schedule.workspace_bytes, char(0xFF)));
  p.workspace = workspace.data();
  variant.launch(p, schedule, nullptr);
  return d;
}

/// Every variant of `variants` that could serve the case.
inline void add_chunk_bwd(std::vector<CaseRun>& runs, CaseFile const& c, std::vector<ChunkBwdVariant> const& variants) {
  for (ChunkBwdVariant const& variant : variants) {
    if (!serves(variant, c)) continue;
    CaseRun run{std::string("chunk_bwd ") + variant.name, [&c, &variant] { return run_chunk_bwd(c, variant); }, {}, {}};
    for (auto const& [name, x] : gradients_of(c)) add_truth(run, c, name);
    runs.push_back(std::move(run));
  }
}

}  // namespace kda::tests
