#!/usr/bin/env bash
# ptxas 13.0.88 and 13.5.37. What a function that a kernel calls spills is not in the kernel's numbers, its stack is.
#
# A kernel of 32 registers calls a __noinline__ function that needs more. "ptxas -v" says of the kernel: 144 bytes of
# stack, no spills. The spills follow behind the kernel's registers, in a block that names the function, without a line
# "Compiling entry function" of its own, and that block in turn has no stack. So a check that takes the first block finds
# no spills, and one that takes the last line before the next kernel blames the kernel and finds no stack. The resource
# usage in the cubin has the stack alone. To know what a kernel spills, add up all blocks up to the next entry.
#
# Output seen on 2026-11-29, with the same lines from 13.5.37:
#   release 13.0, V13.0.88
#   Compiling entry function 'kernel' for 'sm_90a'
#   Function properties for kernel
#   144 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
#   Used 32 registers
#   Function properties for rare
#   0 bytes stack frame, 144 bytes spill stores, 152 bytes spill loads
. "$(dirname "$0")/common.bash"

cat > "$here/kernel.cu" <<'CU'
extern "C" __noinline__ __device__ float rare(float const* x, int n) {
  float a[40];
  for (int i = 0; i < 40; ++i) a[i] = x[i * n];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 40; ++i) {
    sum += a[i] * a[(i * 7 + 3) % 40];
    asm volatile("" ::: "memory");
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(1024, 2) kernel(float* x, int n) {  // 32 registers a thread
  float y = x[threadIdx.x];
  if (n > 1) y = rare(x, n);
  x[threadIdx.x] = y;
}
CU

for release in "13.0.88 13.0.96" "13.5.37 13.5.37"; do
  install_nvcc $release
  output=$("$nvcc" -Xptxas -v -gencode arch=compute_90a,code=sm_90a -cubin "$here/kernel.cu" -o "$here/kernel.cubin" 2>&1 \
    | grep -oE "Compiling entry function 'kernel' for 'sm_90a'|Function properties for [a-z]+|Used [0-9]+ registers|[0-9]+ bytes stack frame, .* loads")
  echo "$output"
  flat=$(tr '\n' ';' <<< "$output")
  expect "$flat" "Function properties for kernel;[1-9][0-9]* bytes stack frame, 0 bytes spill stores, 0 bytes spill loads;Used 32 registers;"
  expect "$flat" "registers;Function properties for rare;0 bytes stack frame, [1-9][0-9]* bytes spill stores, [1-9][0-9]* bytes spill loads;"
done
