#!/usr/bin/env bash
# ptxas 13.0.88 and 13.5.37. Scaling some accumulators of a wgmma, but not all, serialises every wgmma of the kernel.
#
# A loop adds products to an accumulator of four registers a thread and scales it when no product is in flight. With
# all four scaled, or none, the products overlap. With one, two or three of the four, ptxas runs every wgmma of the
# kernel one after another, those of the other accumulator too. The program is legal PTX in all cases.
# ptxas says so only in a line of kind "info", blames "insufficient register resources" in a kernel of 34 registers,
# and ends with exit code 0. "-Werror all-warnings" and ptxas's own "--warning-as-error" do not change that.
# A build that cares has to search the output for "serialized".
#
# Output seen on 2026-11-29, with the same lines from 13.5.37:
#   release 13.0, V13.0.88
#   0 of 4 scaled: exit code 0, no message, 34 registers
#   1 of 4 scaled: exit code 0, (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to
#     insufficient register resources for the wgmma pipeline in the function 'kernel', 34 registers
#   4 of 4 scaled: exit code 0, no message, 34 registers
. "$(dirname "$0")/common.bash"

cat > "$here/kernel.cu" <<'CU'
#include <cstdint>

__device__ void product(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ void pin(float (&d)[4]) { asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])); }

extern "C" __global__ void kernel(uint64_t const* a, uint64_t const* b, float* out, int n) {
  float first[4] = {}, second[4] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    product(first, a[i], b[i]);
    product(second, a[i] + 1, b[i]);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(first);  // the compiler reads no accumulator before the wait
    pin(second);
    for (int j = 0; j < SCALED; ++j) first[j] *= 2;
  }
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = first[i] + second[i];
}
CU

# What ptxas says of a kernel that scales $1 accumulators when warnings are errors.
assemble() {
  local printed code=0
  printed=$("$nvcc" -DSCALED="$1" -Werror all-warnings -Xptxas -v,--warning-as-error \
    -gencode arch=compute_90a,code=sm_90a -cubin "$here/kernel.cu" -o "$here/kernel.cubin" 2>&1) || code=$?
  echo "exit code $code, $(grep -oE "\(C75[0-9]+\) Potential.*'kernel'" <<< "$printed" || echo no message)," \
    "$(grep -oE "[0-9]+ registers" <<< "$printed")"
}

for release in "13.0.88 13.0.96" "13.5.37 13.5.37"; do
  install_nvcc $release
  output="0 of 4 scaled: $(assemble 0)
1 of 4 scaled: $(assemble 1)
4 of 4 scaled: $(assemble 4)"
  echo "$output"
  expect "$output" '^0 of 4 scaled: exit code 0, no message, [1-6][0-9] registers$'
  expect "$output" '^1 of 4 scaled: exit code 0, \(C7511\) .* serialized due to insufficient register .*, [1-6][0-9] reg'
  expect "$output" '^4 of 4 scaled: exit code 0, no message, [1-6][0-9] registers$'
done
