// What every op's glue needs of torch, through its stable ABI alone.
//
// Compiled twice: into _ops.so (kernels under the CUDA key of `kda_cuda`) and, with KDA_EMULATE, into the test-only
// library (the same kernels on the CPU, under the CPU key of `kda_cuda_emulated`). Schemas are in kda_cuda/library.py.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>

#include "kda/dtype.h"
#include "kda/errors.h"

#if defined(KDA_EMULATE)
#define KDA_TORCH_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(kda_cuda_emulated, CPU, m)
#else
#define KDA_TORCH_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(kda_cuda, CUDA, m)
// Weak: the library also loads with a torch that was built without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace kda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Makes the tensor's device current and knows its stream.
class OnDeviceOf {
 public:
#if defined(KDA_EMULATE)
  explicit OnDeviceOf(Tensor const&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDeviceOf(Tensor const& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream))
      throw std::runtime_error("kda_cuda: this torch has no CUDA streams");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

inline std::string shape_text(Tensor const& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

inline Dtype dtype_of_tensor(char const* op, char const* name, Tensor const& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    default:
      bad_argument(op,
                   std::string(name) + " has a dtype that kernels do not take, expected float32, float16 or bfloat16");
  }
}

inline void require_shape(char const* op, char const* name, Tensor const& x, std::initializer_list<int64_t> expected) {
  bool same = x.dim() == int64_t(expected.size());
  int64_t i = 0;
  for (int64_t n : expected) same = same && x.size(i++) == n;
  if (same) return;
  std::string text;
  for (int64_t n : expected) text += (text.empty() ? "" : ", ") + std::to_string(n);
  bad_argument(op, std::string(name) + " has shape " + shape_text(x) + ", expected [" + text + "]");
}

/// Kernels follow pointers of one device only, that of `first`. Null: an absent argument.
inline void require_device_of(char const* op, char const* first_name, Tensor const& first,
                              std::initializer_list<std::pair<char const*, Tensor const*>> arguments) {
  bool const cuda = first.is_cuda();
  int32_t const device = cuda ? first.get_device_index() : 0;
  for (auto const& [name, x] : arguments)
    if (x && (x->is_cuda() != cuda || (cuda && x->get_device_index() != device)))
      bad_argument(op, std::string(name) + " is on another device than " + first_name);
}
inline Tensor const* if_given(OptionalTensor const& x) { return x ? &*x : nullptr; }

inline bool is_int64(char const* op, char const* name, Tensor const& x) {
  bool const wide = x.scalar_type() == ScalarType::Long;
  if (!wide && x.scalar_type() != ScalarType::Int)
    bad_argument(op, std::string(name) + " has a dtype that is no index, expected int32 or int64");
  return wide;
}

/// Null where the argument is absent.
inline float const* optional_floats(char const* op, char const* name, OptionalTensor const& x) {
  if (!x) return nullptr;
  require(x->scalar_type() == ScalarType::Float && x->is_contiguous(), op,
          std::string(name) + " is not a contiguous float32 tensor");
  return static_cast<float const*>(x->data_ptr());
}

}  // namespace kda
