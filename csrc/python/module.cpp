// kda_cuda._C: build information. The ops do not need it: they are in _ops.so, which knows no Python.
#include <pybind11/pybind11.h>

static char const kBuildInfo[] =
#include "build_info.inc"
    ;

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was compiled: versions, architectures, and what ptxas reported of every kernel.";
  m.def(
      "build_info", [] { return pybind11::module_::import("json").attr("loads")(kBuildInfo); },
      "A dict with the versions, the architectures and `kernels`: registers, spills, shared memory of each.");
}
