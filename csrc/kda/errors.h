// Errors of the caller: ValueError in Python, message verbatim.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

namespace kda {

/// "kda_cuda::chunk_fwd: k has shape [1, 64], expected ..."
[[noreturn]] inline void bad_argument(std::string const& op, std::string const& what) {
  throw std::invalid_argument("kda_cuda::" + op + ": " + what);
}

/// `what`: a text, or a function that makes one where it is needed.
template <class Text>
inline void require(bool holds, char const* op, Text const& what) {
  if (holds) return;
  if constexpr (std::is_invocable_v<Text const&>) bad_argument(op, what());
  else bad_argument(op, what);
}

}  // namespace kda
