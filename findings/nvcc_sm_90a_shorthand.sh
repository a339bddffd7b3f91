#!/usr/bin/env bash
# nvcc 13.0.88 and 13.5.37. "-arch=sm_90a" compiles the source for plain compute_90 too, so kernels with wgmma fail.
#
# "-arch=sm_90" stands for machine code and PTX of that one target. "-arch=sm_90a" adds PTX of compute_90, a target
# that has no wgmma: ptxas checks that PTX and refuses it. "-cubin" hides this, since it compiles one target alone.
# sm_100a and sm_120a behave so too. "-gencode arch=compute_90a,code=sm_90a" compiles what it says.
#
# Output seen on 2026-11-29, with the same three lines from 13.5.37:
#   release 13.0, V13.0.88
#   -arch=sm_90  kind=elf,sm=90 kind=ptx,sm=90
#   -arch=sm_90a  kind=ptx,sm=90 kind=elf,sm=90a kind=ptx,sm=90a
#   ptxas ... compute_90.ptx, line ...; error   : Instruction 'wgmma.fence' not supported on .target 'sm_90'
. "$(dirname "$0")/common.bash"

cat > "$here/kernel.cu" <<'CU'
__global__ void kernel() { asm volatile("wgmma.fence.sync.aligned;"); }
CU

# The images that nvcc would put into the object, in the words of its own command for fatbinary.
images() {
  local commands
  commands=$("$nvcc" "$1" -c "$here/kernel.cu" -o "$here/kernel.o" --dryrun 2>&1)
  echo "$1 " $(grep -oE "kind=(elf|ptx),sm=[0-9]+[af]?" <<< "$commands")
}

for release in "13.0.88 13.0.96" "13.5.37 13.5.37"; do
  install_nvcc $release
  plain=$(images -arch=sm_90)
  specific=$(images -arch=sm_90a)
  printf '%s\n' "$plain" "$specific"
  expect "$plain" '^-arch=sm_90  kind=elf,sm=90 kind=ptx,sm=90$'
  expect "$specific" '^-arch=sm_90a  kind=ptx,sm=90 kind=elf,sm=90a kind=ptx,sm=90a$'

  errors=$("$nvcc" -arch=sm_90a -c "$here/kernel.cu" -o "$here/kernel.o" 2>&1) && expect "it compiles" "it does not"
  echo "$errors" | head -n 1 | sed 's/[^ ]*tmpxft[^.]*\./... /'
  expect "$errors" "compute_90\.ptx.* Instruction 'wgmma.fence' not supported on .target 'sm_90'"

  "$nvcc" -arch=sm_90a -cubin "$here/kernel.cu" -o "$here/kernel.cubin"
  "$nvcc" -gencode arch=compute_90a,code=sm_90a -c "$here/kernel.cu" -o "$here/kernel.o"
done
