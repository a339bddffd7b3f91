// primitives --list: the programs, one a line: name, tolerance of the comparison (0: bit by bit), its floor.
// primitives DIRECTORY [SEED [NAME...]]: writes the output of every program, or of those named, to
// DIRECTORY/<name>.bin. SEED: the emulator's schedule. On a GPU a fault ends every later launch of its process, so that
// a caller who wants to know about the others runs one at a time.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>

#include "tests/programs/all.h"

namespace {

int list(std::vector<kda::tests::Program> const& programs) {
  for (auto const& p : programs) std::printf("%s %.9g %.9g\n", p.name.c_str(), p.tolerance, p.floor);
  return 0;
}

bool write_output(kda::tests::Program const& program, std::string const& directory) {
  try {
    std::vector<char> const bytes = program.run();
    std::ofstream file(directory + "/" + program.name + ".bin", std::ios::binary);
    return file.write(bytes.data(), ptrdiff_t(bytes.size())).flush().good();
  } catch (std::exception const& error) {
    return std::fprintf(stderr, "%s: %s\n", program.name.c_str(), error.what()), false;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: %s --list | DIRECTORY [SEED [NAME...]]\n", argv[0]), 2;
  std::vector<kda::tests::Program> const programs = kda::tests::programs();
  if (std::string(argv[1]) == "--list") return list(programs);
#if defined(KDA_EMULATE)
  kda::emulator::options().has_wgmma = true;  // to be the GPU that it is compared with
  if (argc > 2) kda::emulator::options().seed = std::strtoull(argv[2], nullptr, 10);
#endif
  int failures = 0;
  std::vector<std::string> const names(argv + std::min(argc, 3), argv + argc);
  for (std::string const& name : names)
    if (std::none_of(programs.begin(), programs.end(), [&](auto const& p) { return p.name == name; }))
      return std::fprintf(stderr, "there is no program %s\n", name.c_str()), 2;
  for (kda::tests::Program const& program : programs)
    if (names.empty() || std::find(names.begin(), names.end(), program.name) != names.end())
      failures += !write_output(program, argv[1]);
  return failures ? 1 : 0;
}
