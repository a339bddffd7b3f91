// kda_cuda._C: build information, and signatures of calls. The ops do not need it: they are in _ops.so, which knows no
// Python.
#include <pybind11/pybind11.h>

#include "python/signature.h"

static char const kBuildInfo[] =
#include "build_info.inc"
    ;

// Not by pybind11, whose own call costs as much as a signature.
static PyMethodDef signature_method = {
    "signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&kda::signature)), METH_FASTCALL,
    "What the checks of a call depend on; see csrc/python/signature.h."};

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was compiled: versions, architectures, and what ptxas reported of every kernel; signatures of calls.";
  m.def(
      "build_info", [] { return pybind11::module_::import("json").attr("loads")(kBuildInfo); },
      "A dict with the versions, the architectures and `kernels`: registers, spills, shared memory of each.");
  m.def(
      "use_tensors",
      [](pybind11::object tensor, pybind11::object parameter, pybind11::object dtype) {
        return kda::use_tensors(tensor.ptr(), parameter.ptr(), dtype.ptr());
      },
      "Says what a tensor, a parameter and a dtype are; whether there are signatures then.");
  m.attr("signature") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&signature_method, nullptr, nullptr));
}
