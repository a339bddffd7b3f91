#!/usr/bin/env bash
# nvcc 13.0.88 and 13.5.37. A kernel template takes a struct as its argument, but none with an array in it.
#
# C++20 allows both structs as template arguments. nvcc accepts both for device functions and for host functions.
# For a kernel it writes a host stub that spells the argument, and "int [2]{(int)3, (int)4}" is not an expression.
# So g++ reports a parse error in a generated file, and the source has no fault. A kernel can take a type instead that
# holds the struct as a static constexpr member.
#
# Output seen on 2026-11-29, with the same four lines from 13.5.37:
#   release 13.0, V13.0.88
#   struct of two ints, kernel: compiles
#   struct with an array, device and host functions: compiles
#   struct with an array, kernel: error: parse error in template argument list
#   struct with an array, kernel on a type that holds it: compiles
. "$(dirname "$0")/common.bash"

cat > "$here/kernel.cu" <<'CU'
struct Numbers { int rows, columns; };
struct Array { int sizes[2]; };

template <auto kConfig> __global__ void kernel(int* out) { *out = sizeof(kConfig); }
template <class T> __global__ void kernel_on_type(int* out) { *out = sizeof(T::config); }
template <auto kConfig> __host__ __device__ int function() { return sizeof(kConfig); }
__global__ void caller(int* out) { *out = function<Array{{3, 4}}>(); }
struct Holder { static constexpr Array config{{3, 4}}; };

#if CASE == 1
void launch(int* out) { kernel<Numbers{3, 4}><<<1, 1>>>(out); }
#elif CASE == 2
void launch(int* out) { caller<<<1, function<Array{{3, 4}}>()>>>(out); }
#elif CASE == 3
void launch(int* out) { kernel<Array{{3, 4}}><<<1, 1>>>(out); }
#else
void launch(int* out) { kernel_on_type<Holder><<<1, 1>>>(out); }
#endif
CU

# How it goes: "compiles", or the first error.
outcome() {
  local printed
  if printed=$("$nvcc" -std=c++20 -gencode arch=compute_90a,code=sm_90a -DCASE="$1" -c "$here/kernel.cu" \
    -o "$here/kernel.o" 2>&1); then echo compiles; else grep -m 1 -o "error: .*" <<< "$printed"; fi
}

for release in "13.0.88 13.0.96" "13.5.37 13.5.37"; do
  install_nvcc $release
  output="struct of two ints, kernel: $(outcome 1)
struct with an array, device and host functions: $(outcome 2)
struct with an array, kernel: $(outcome 3)
struct with an array, kernel on a type that holds it: $(outcome 4)"
  echo "$output"
  expect "$output" '^struct of two ints, kernel: compiles$'
  expect "$output" '^struct with an array, device and host functions: compiles$'
  expect "$output" '^struct with an array, kernel: error: parse error in template argument list$'
  expect "$output" '^struct with an array, kernel on a type that holds it: compiles$'
done
