// product_plants PLANT CASE: the backward with one of the bugs of product_plants.py, or none, on a case, in rounds of
// one value head. Prints what is wrong with the gradients, and exits 1 where something is.
#include <algorithm>
#include <cstdio>

#include "planted.h"
#include "tests/case_bwd.h"
#include "tests/case_check.h"

namespace kda::tests {
namespace {

int run_planted(CaseFile const& c) {
  std::vector<ChunkBwdVariant> const backwards = {describe_chunk_bwd<Bf16K128Sm90>()};
  std::vector<CaseRun> runs;
  add_chunk_bwd(runs, c, backwards);
  if (runs.empty()) return std::printf("WRONG nothing serves %s\n", c.name().c_str());
  try {
    return check_accuracy(c, runs[0], run_chunk_bwd(c, backwards[0], 1));
  } catch (emulator::Error const& error) {
    return complain(c, runs[0], error.what());
  }
}

}  // namespace
}  // namespace kda::tests

int main(int argc, char** argv) {
  using namespace kda::tests;
  auto const name = argc == 3 ? std::find(std::begin(kPlants), std::end(kPlants), std::string(argv[1])) : nullptr;
  if (argc != 3 || name == std::end(kPlants)) return std::fprintf(stderr, "usage: %s PLANT CASE\n", argv[0]), 2;
  planted = Plant(name - kPlants);
  kda::emulator::options().has_wgmma = true;
  return run_planted(CaseFile(argv[2])) ? 1 : 0;
}
