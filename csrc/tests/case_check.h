// What is wrong with results of a case.
#pragma once
#include <cstdio>

#include "tests/case_kernels.h"

namespace kda::tests {

/// Prints what is wrong; returns how much.
inline int complain(CaseFile const& c, CaseRun const& run, std::string const& what) {
  std::printf("WRONG %s on %s: %s\n", run.kernel.c_str(), c.name().c_str(), what.c_str());
  return 1;
}

/// Prints what is beyond the error budget.
inline int check_accuracy(CaseFile const& c, CaseRun const& run, std::map<std::string, CaseTensor> const& results) {
  int wrong = 0;
  for (auto const& [name, x] : results) {
    CaseError const error = measure(x, run.truth.at(name));
    auto const [rms, worst_row] = run.budget.at(name);
    if (error.rms <= rms && error.worst_row <= worst_row && error.same_nonfinite) continue;
    char text[256];
    std::snprintf(text, sizeof text, "%s: relative RMS error %.3g of %.3g, worst row %.3g of %.3g%s", name.c_str(),
                  error.rms, rms, error.worst_row, worst_row, error.same_nonfinite ? "" : ", other non-finite values");
    wrong += complain(c, run, text);
  }
  return wrong;
}

}  // namespace kda::tests
