// What the checks of a call depend on, as bytes: equal bytes, equal checks.
#pragma once
#include <Python.h>

namespace kda {

/// Says what tensors are: the types, and through the first of them how they describe themselves. False: this torch does
/// not say, and no call has a signature.
bool use_tensors(PyObject* tensor, PyObject* parameter, PyObject* dtype);

/// `signature(args, kwargs, context)`: (bytes, values), or None where a value has no signature.
///
/// The bytes have dtype, device, shape and strides of each tensor, which tensors are one object, the names and all
/// other values with their types. `context` and the environment's KDA_CUDA_CHECK stand before them. Where the first
/// element of `context` is True they also say which tensors require a gradient. `values` are those of args and kwargs,
/// and then the elements of tuples and lists among them.
PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace kda
