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

#include <array>
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

/// A new tensor without gaps on the device of `like`, and of its dtype unless one is given. torch::stable::new_empty
/// passes the dispatcher twice, this once: in some calls allocation is half of what the host does.
inline Tensor empty(Tensor const& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMostDimensions = 8;
  if (sizes.size() > kMostDimensions) return torch::stable::new_empty(like, sizes, dtype);
  std::array<int64_t, kMostDimensions> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  int32_t code = 0, device_type = 0;
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  else STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), code,
                                                         device_type, like.get_device_index(), &made));
  return Tensor(made);
}

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
  if (x->scalar_type() != ScalarType::Float || !x->is_contiguous())
    bad_argument(op, std::string(name) + " is not a contiguous float32 tensor");
  return static_cast<float const*>(x->data_ptr());
}

}  // namespace kda
