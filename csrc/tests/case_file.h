// The cases of python_tests/support/case_files.py, which says how a file is laid out.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kda/dtype.h"
#include "tests/programs/program.h"

namespace kda::tests {

/// The dtypes of a file; the first three are those of kda::Dtype.
enum class FileDtype : uint32_t { kFloat32, kFloat16, kBfloat16, kFloat64, kInt32, kInt64 };

inline int64_t bytes_of_dtype(FileDtype dtype) {
  constexpr int64_t kBytes[] = {4, 2, 2, 8, 4, 8};
  return kBytes[size_t(dtype)];
}

/// A contiguous tensor, in memory that ends where it ends.
class CaseTensor {
 public:
  FileDtype dtype = FileDtype::kFloat32;
  std::vector<int64_t> shape;

  CaseTensor() = default;
  CaseTensor(FileDtype type, std::vector<int64_t> size, std::vector<char> const& bytes)
      : dtype(type), shape(std::move(size)), buffer_(std::make_shared<Buffer<char>>(bytes)) {}
  /// Poisoned, for an output.
  CaseTensor(FileDtype type, std::vector<int64_t> size) : dtype(type), shape(std::move(size)) {
    buffer_ = std::make_shared<Buffer<char>>(std::vector<char>(size_t(elements() * bytes_of_dtype(dtype)), char(0xFF)));
  }

  int64_t elements() const {
    int64_t n = 1;
    for (int64_t const d : shape) n *= d;
    return n;
  }
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(buffer_->data());
  }
  std::vector<char> bytes() const { return buffer_->download(); }
  double operator[](int64_t i) const {
    switch (dtype) {
      case FileDtype::kFloat32:
        return data<float>()[i];
      case FileDtype::kFloat16:
        return to_float(data<Fp16>()[i]);
      case FileDtype::kBfloat16:
        return to_float(data<Bf16>()[i]);
      case FileDtype::kFloat64:
        return data<double>()[i];
      case FileDtype::kInt32:
        return data<int32_t>()[i];
      default:
        return double(data<int64_t>()[i]);
    }
  }

 private:
  std::shared_ptr<Buffer<char>> buffer_;
};

class CaseFile {
 public:
  explicit CaseFile(std::string const& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    char magic[8];
    file.read(magic, 8);
    if (!file || std::memcmp(magic, "KDACASE1", 8) != 0) throw std::runtime_error(path + " is no case file");
    uint32_t const entries = take<uint32_t>(file);
    for (uint32_t i = 0; i < entries; ++i) {
      std::string name(take<uint32_t>(file), '\0');
      file.read(name.data(), ptrdiff_t(name.size()));
      auto const dtype = FileDtype(take<uint32_t>(file));
      std::vector<int64_t> shape(take<uint32_t>(file));
      for (int64_t& d : shape) d = take<int64_t>(file);
      std::vector<char> data(take<uint64_t>(file));
      file.read(data.data(), ptrdiff_t(data.size()));
      if (!file) throw std::runtime_error(path + " ends too early");
      tensors_.emplace(name, CaseTensor(dtype, shape, data));
    }
  }
  /// The file's name without folder and extension.
  std::string name() const {
    size_t const slash = path_.rfind('/') + 1;
    return path_.substr(slash, path_.rfind('.') - slash);
  }
  bool has(std::string const& name) const { return tensors_.count(name) != 0; }
  CaseTensor const& operator[](std::string const& name) const {
    auto const it = tensors_.find(name);
    if (it == tensors_.end()) throw std::runtime_error(path_ + " has no " + name);
    return it->second;
  }
  double scalar(std::string const& name) const { return (*this)[name][0]; }
  template <class T>
  T* pointer_or_null(std::string const& name) const {
    return has(name) ? (*this)[name].data<T>() : nullptr;
  }

 private:
  std::string path_;
  std::map<std::string, CaseTensor> tensors_;

  template <class T>
  static T take(std::ifstream& file) {
    T value{};
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
};

/// As accuracy.measure in python_tests.
struct CaseError {
  double rms = 0, worst_row = 0;
  bool same_nonfinite = true;
};

inline float rounded_to(FileDtype dtype, float x) {
  if (dtype == FileDtype::kFloat16) return to_float(from_float<Fp16>(x));
  if (dtype == FileDtype::kBfloat16) return to_float(from_float<Bf16>(x));
  return x;
}

inline CaseError measure(CaseTensor const& x, CaseTensor const& truth) {
  if (x.elements() != truth.elements()) throw std::runtime_error("a result has another size than its truth");
  CaseError error;
  int64_t const columns = truth.shape.empty() || truth.elements() == 0 ? 1 : truth.shape.back();
  int64_t const rows = truth.elements() / columns;
  double sum = 0, truth_sum = 0, worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double row = 0;
    for (int64_t c = 0; c < columns; ++c) {
      double const got = x[r * columns + c], expected = truth[r * columns + c];
      float const rounded = rounded_to(x.dtype, float(expected));
      if (!std::isfinite(rounded) || !std::isfinite(got)) {
        bool const same = std::isnan(rounded) ? std::isnan(got) : got == double(rounded);
        error.same_nonfinite = error.same_nonfinite && same;
        continue;
      }
      row += (got - expected) * (got - expected), truth_sum += expected * expected;
    }
    sum += row, worst = std::max(worst, row);
  }
  if (truth_sum == 0) {
    error.rms = error.worst_row = sum == 0 ? 0 : INFINITY;
    return error;
  }
  error.rms = std::sqrt(sum / truth_sum);
  error.worst_row = std::sqrt(worst / (truth_sum / double(rows)));
  return error;
}

}  // namespace kda::tests
