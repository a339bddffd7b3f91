// GoogleTest's main, with --seed=N: the emulator's schedule (0: threads in order).
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "emulator/engine.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i)
    if (std::strncmp(argv[i], "--seed=", 7) == 0)
      kda::emulator::options().seed = std::strtoull(argv[i] + 7, nullptr, 10);
  return RUN_ALL_TESTS();
}
