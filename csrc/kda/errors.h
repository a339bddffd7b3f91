// Errors of the caller: ValueError in Python, message verbatim.
#pragma once
#include <stdexcept>
#include <string>

namespace kda {

/// "kda_cuda::chunk_fwd: k has shape [1, 64], expected ..."
[[noreturn]] inline void bad_argument(std::string const& op, std::string const& what) {
  throw std::invalid_argument("kda_cuda::" + op + ": " + what);
}

inline void require(bool holds, char const* op, std::string const& what) {
  if (!holds) bad_argument(op, what);
}

}  // namespace kda
