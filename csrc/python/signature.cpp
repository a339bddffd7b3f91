#include "python/signature.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace kda {
namespace {

// What is needed of the DLPack exchange protocol, version 1: how a framework describes one of its tensors to C without
// a copy and without a Python object. torch has it from 2.10 on, as `torch.Tensor.__dlpack_c_exchange_api__`.
struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t rank;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t const *sizes, *strides;
  uint64_t byte_offset;
};
struct DlExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*describe)(void* object, DlTensor* described);  // 0, or a Python error is set
};

struct Known {
  PyObject *tensor, *parameter, *dtype;  // types
  PyObject* requires_grad;               // a name
  int (*describe)(void*, DlTensor*);
};
Known known{};

/// Writes the signature, and lists the values that it describes.
class Writer {
 public:
  /// Whether the value has a signature. Elements of a tuple or a list are listed after all values.
  bool value(PyObject* x, bool with_grad) {
    PyTypeObject* const type = Py_TYPE(x);
    if (x == Py_None || x == Py_True || x == Py_False) return tag(x == Py_None ? 'n' : x == Py_True ? 't' : 'f');
    if (is(type, known.tensor) || is(type, known.parameter)) return tensor(x, with_grad);
    if (type == &PyFloat_Type) return tag('d') && put(PyFloat_AS_DOUBLE(x));
    if (type == &PyLong_Type) return integer(x);
    if (type == &PyUnicode_Type) return text(x);
    if (is(type, known.dtype)) return tag('y') && put(x);  // one object for each, which lives for ever
    if (PyTuple_Check(x) || type == &PyList_Type) return sequence(x, with_grad);
    return false;
  }
  bool text(PyObject* x) {
    Py_ssize_t size = 0;
    char const* const utf8 = PyUnicode_AsUTF8AndSize(x, &size);
    return utf8 && tag('s') && put(size) && bytes(utf8, size_t(size));
  }
  bool elements(bool with_grad) {
    for (int s = 0; s < sequences_; ++s)
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(nested_[s]); ++i) {
        PyObject* const x = PySequence_Fast_GET_ITEM(nested_[s], i);
        if (PyTuple_Check(x) || PyList_Check(x) || !value(x, with_grad) || !list(x)) return false;
      }
    return true;
  }
  bool environment(char const* name) {
    char const* const value = std::getenv(name);
    return value ? tag('e') && bytes(value, std::strlen(value) + 1) : tag('n');
  }
  bool list(PyObject* x) { return listed_ < kMost && (values_[listed_++] = x); }
  bool tag(char kind) { return bytes(&kind, 1); }
  PyObject* key() const { return PyBytes_FromStringAndSize(text_, Py_ssize_t(length_)); }
  PyObject* values() const {
    PyObject* const tuple = PyTuple_New(listed_);
    for (int i = 0; tuple && i < listed_; ++i) PyTuple_SET_ITEM(tuple, i, Py_NewRef(values_[i]));
    return tuple;
  }

 private:
  static constexpr int kMost = 64, kMostSequences = 4;
  static constexpr size_t kBytes = 8192;

  static bool is(PyTypeObject* type, PyObject* of) { return reinterpret_cast<PyObject*>(type) == of; }
  bool bytes(void const* from, size_t count) {
    if (length_ + count > kBytes) return false;
    std::memcpy(text_ + length_, from, count);
    length_ += count;
    return true;
  }
  template <class T>
  bool put(T x) {
    return bytes(&x, sizeof x);
  }
  bool integer(PyObject* x) {
    int overflow = 0;
    long long const number = PyLong_AsLongLongAndOverflow(x, &overflow);
    return !overflow && tag('i') && put(number);
  }
  /// A tensor that was there before is that one again: what a call does may depend on it.
  bool tensor(PyObject* x, bool with_grad) {
    for (int i = 0; i < tensors_; ++i)
      if (seen_[i] == x) return tag('a') && put(i);
    DlTensor d{};
    if (tensors_ == kMost || known.describe(x, &d)) return false;
    seen_[tensors_++] = x;
    size_t const row = size_t(d.rank) * sizeof(int64_t);
    return tag('T') && put(d.device_type) && put(d.device_index) && put(d.type_code) && put(d.type_bits) &&
           put(d.type_lanes) && put(d.rank) && bytes(d.sizes, row) && (!row || (d.strides && bytes(d.strides, row))) &&
           (!with_grad || gradient(x));
  }
  bool gradient(PyObject* x) {
    PyObject* const flag = PyObject_GetAttr(x, known.requires_grad);
    Py_XDECREF(flag);
    return flag && tag(flag == Py_True ? 'g' : '-');
  }
  bool sequence(PyObject* x, bool) {
    if (sequences_ == kMostSequences) return false;
    nested_[sequences_++] = x;
    return tag('(') && put(Py_TYPE(x)) && put(PySequence_Fast_GET_SIZE(x));
  }

  char text_[kBytes];
  size_t length_ = 0;
  PyObject *values_[kMost], *seen_[kMost], *nested_[kMostSequences];
  int listed_ = 0, tensors_ = 0, sequences_ = 0;
};

bool write(Writer& writer, PyObject* args, PyObject* kwargs, PyObject* context) {
  bool const with_grad = PyTuple_GET_SIZE(context) && PyTuple_GET_ITEM(context, 0) == Py_True;
  if (!writer.environment("KDA_CUDA_CHECK")) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(context); ++i)
    if (!writer.value(PyTuple_GET_ITEM(context, i), false)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* const x = PyTuple_GET_ITEM(args, i);
    if (!writer.value(x, with_grad) || !writer.list(x)) return false;
  }
  PyObject *name, *x;
  for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &name, &x);)
    if (!writer.tag('=') || !writer.text(name) || !writer.value(x, with_grad) || !writer.list(x)) return false;
  return writer.elements(with_grad);
}

}  // namespace

bool use_tensors(PyObject* tensor, PyObject* parameter, PyObject* dtype) {
  PyObject* const capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  auto const* api = capsule ? static_cast<DlExchangeApi const*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"))
                            : nullptr;  // it lives for ever, the capsule need not
  Py_XDECREF(capsule);
  PyErr_Clear();
  if (!api || api->version.major != 1 || !api->describe) return false;
  known = {Py_NewRef(tensor), Py_NewRef(parameter), Py_NewRef(dtype), PyUnicode_InternFromString("requires_grad"),
           api->describe};
  return true;
}

PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(arguments[0]) || !PyDict_Check(arguments[1]) || !PyTuple_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "signature: expected a tuple, a dict and a tuple");
    return nullptr;
  }
  Writer writer;
  if (!known.describe || !write(writer, arguments[0], arguments[1], arguments[2])) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  PyObject *const key = writer.key(), *const values = writer.values();
  PyObject* const both = key && values ? PyTuple_Pack(2, key, values) : nullptr;
  Py_XDECREF(key), Py_XDECREF(values);
  return both;
}

}  // namespace kda
