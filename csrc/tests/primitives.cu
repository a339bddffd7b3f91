// primitives DIRECTORY [SEED]: writes the output of every program to DIRECTORY/<name>.bin, and their list with the
// tolerance of the comparison (0: bit by bit) and its floor to DIRECTORY/programs.txt. SEED: the emulator's schedule.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>

#include "tests/programs/all.h"

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: %s DIRECTORY [SEED]\n", argv[0]), 2;
#if defined(KDA_EMULATE)
  if (argc > 2) kda::emulator::options().seed = std::strtoull(argv[2], nullptr, 10);
#endif
  std::string const directory = std::string(argv[1]) + "/";
  std::ofstream list(directory + "programs.txt");
  int failures = 0;
  for (kda::tests::Program const& program : kda::tests::programs()) {
    try {
      std::vector<char> const bytes = program.run();
      std::ofstream(directory + program.name + ".bin", std::ios::binary).write(bytes.data(), ptrdiff_t(bytes.size()));
      list << program.name << ' ' << program.tolerance << ' ' << program.floor << '\n';
    } catch (std::exception const& error) {
      std::fprintf(stderr, "%s: %s\n", program.name.c_str(), error.what());
      ++failures;
    }
  }
  return failures ? 1 : list.flush().good() ? 0 : 1;
}
