// Kernels that are wrong on purpose, and what the engine must say of them.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "platform/launch.h"
#include "platform/platform.h"
#include "tile/shared_tile.h"

namespace kda::tests {

/// The line that the diagnostic must name: `MARK sync_block();` (never within a macro's argument, which has one line).
inline std::atomic<int> marked_line{0};
#define MARK ::kda::tests::marked_line.store(__LINE__, std::memory_order_relaxed);

struct Words {
  alignas(1024) uint32_t word[1024];
  Mbarrier barrier[2];
};
using Kernel = void (*)(uint32_t* global);

/// What the engine says of kernel(global, arguments...); empty: nothing. `global` has 1024 words.
template <class... P>
std::string complaint(unsigned threads, void (*kernel)(uint32_t*, P...), std::vector<uint32_t>* global = nullptr,
                      std::decay_t<P>... arguments) {
  std::vector<uint32_t> own(1024 + 64);
  std::vector<uint32_t>& memory = global ? *global : own;
  memory.resize(1024 + 64);
  uintptr_t const aligned = (reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128;
  marked_line = 0;
  try {
    launch("planted", kernel, dim3(1), dim3(threads), sizeof(Words), nullptr, reinterpret_cast<uint32_t*>(aligned),
           arguments...);
  } catch (emulator::Error const& error) {
    return error.what();
  }
  return "";
}

/// What was said contains `text`, and where the kernel has a MARK, its file and line.
inline void expect_said(std::string const& said, std::string const& text, char const* file = __builtin_FILE()) {
  EXPECT_NE(said.find(text), std::string::npos) << "expected: " << text << "\nsaid: " << said;
  EXPECT_EQ(said.rfind("planted: ", 0), 0u) << said;
  if (marked_line == 0) return;
  std::string const place = std::string(file) + ":" + std::to_string(marked_line.load());
  EXPECT_NE(said.find(place), std::string::npos) << "expected: " << place << "\nsaid: " << said;
}
inline void expect_complaint(unsigned threads, std::string const& text, Kernel kernel,
                             char const* file = __builtin_FILE()) {
  expect_said(complaint(threads, kernel), text, file);
}
/// How many words are `value`.
inline int count_of(std::vector<uint32_t> const& words, uint32_t value) {
  return int(std::count(words.begin(), words.end(), value));
}

}  // namespace kda::tests
