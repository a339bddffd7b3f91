// run_cases FIRST COUNT FILE...: every kernel that serves a case, under COUNT schedules, the seeds FIRST, FIRST + 1,
// ... Within the error budget in the first, the same bits in the others. Prints "ran KERNEL" for each, and exits 1
// where something is wrong.
//
// KDA_SLICE: the few variants of chunk_fwd and chunk_bwd that one of each kind makes, instead of all (make test).
#include <cstdio>
#include <cstdlib>

#include "tests/case_bwd.h"
#include "tests/case_check.h"
#include "tests/case_pools.h"
#include "tests/case_surroundings.h"

namespace kda::tests {
namespace {

std::vector<ChunkFwdVariant> const& variants() {
#if defined(KDA_SLICE)
  static std::vector<ChunkFwdVariant> const slice = {describe_chunk_fwd<Bf16K64Sm90>(),
                                                     describe_chunk_fwd<Bf16K64C32>(), describe_chunk_fwd<Fp32K64>()};
  return slice;
#else
  return chunk_fwd_variants();
#endif
}

std::vector<ChunkBwdVariant> const& backward_variants() {
#if defined(KDA_SLICE)
  static std::vector<ChunkBwdVariant> const slice = {describe_chunk_bwd<Bf16K64Sm90>(), describe_chunk_bwd<Fp32K64>()};
  return slice;
#else
  return chunk_bwd_variants();
#endif
}

int run_under(CaseFile const& c, CaseRun const& run, int first_seed, int schedules) {
  std::map<std::string, std::vector<char>> first;
  int wrong = 0;
  for (int seed = first_seed; seed < first_seed + schedules; ++seed) {
    emulator::options().seed = uint64_t(seed);
    emulator::options().os_threads = 1 + seed % 2;
    auto const results = run.run();
    if (seed == first_seed) wrong += check_accuracy(c, run, results);
    for (auto const& [name, x] : results) {
      auto const [it, fresh] = first.emplace(name, x.bytes());
      if (!fresh && it->second != x.bytes())
        wrong += complain(c, run, name + " has other bits under schedule " + std::to_string(seed));
    }
  }
  std::printf("ran %s\n", run.kernel.c_str());
  return wrong;
}

int run_case(CaseFile const& c, int first_seed, int schedules) {
  std::vector<CaseRun> runs;
  add_chunk_fwd(runs, c, variants());
  add_chunk_bwd(runs, c, backward_variants());
  add_prefill(runs, c, variants());
  add_decode(runs, c);
  add_decode_layer(runs, c);
  add_gate(runs, c);
  add_short_conv(runs, c);
  add_gated_rmsnorm(runs, c);
  int wrong = runs.empty() ? std::printf("WRONG nothing serves %s\n", c.name().c_str()) : 0;
  for (CaseRun const& run : runs) {
    try {
      wrong += run_under(c, run, first_seed, schedules);
    } catch (emulator::Error const& error) {
      wrong += complain(c, run, error.what());
    }
  }
  return wrong;
}

}  // namespace
}  // namespace kda::tests

int main(int argc, char** argv) {
  int const first_seed = argc > 3 ? std::atoi(argv[1]) : 0, schedules = argc > 3 ? std::atoi(argv[2]) : 0;
  if (schedules < 1) return std::fprintf(stderr, "usage: %s FIRST COUNT FILE...\n", argv[0]), 2;
  kda::emulator::options().has_wgmma = true;  // kernels overlap
  int wrong = 0;
  for (int i = 3; i < argc; ++i) wrong += kda::tests::run_case(kda::tests::CaseFile(argv[i]), first_seed, schedules);
  return wrong ? 1 : 0;
}
