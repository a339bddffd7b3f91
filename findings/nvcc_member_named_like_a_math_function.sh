#!/usr/bin/env bash
# nvcc 13.0.88. In a template, the condition of a for loop cannot compare a member that is called round.
#
# `for (; p.round < n; ++p.round)` ends in: expected a ">". The headers of CUDA declare function templates of the names
# of the C library's functions, and nvcc takes `round <` for the beginning of one, although p has a member of that name.
# The type of p need not depend on the template. floor and pow behave alike, while max and count are fine.
# The condition of while, an if or a return with the same comparison compiles, and so do a pair of parentheses around
# the member, the comparison the other way round, and the loop outside of a template. g++ takes all of them, and so does nvcc 13.5.37.
#
# Output seen on 2026-11-30; from 13.5.37 every loop compiles:
#   release 13.0, V13.0.88
#   for (; p.round < n; ++p.round) {}: error: expected a ">"
#   for (; p.pow < n; ++p.pow) {}: error: expected a ">"
#   for (; p.count < n; ++p.count) {}: compiles
#   while (p.round < n) ++p.round;: compiles
#   for (; (p.round) < n; ++p.round) {}: compiles
. "$(dirname "$0")/common.bash"

# outcome LOOP: "compiles", or the first error, for a loop in a template over the members of a plain struct.
outcome() {
  local printed
  printf 'struct Members { int round, pow, count; };\n' > "$here/loop.cu"
  printf 'template <class T> int loop(Members p, int n) { %s return p.round; }\n' "$1" >> "$here/loop.cu"
  printf 'int main() { return loop<int>({}, 0); }\n' >> "$here/loop.cu"
  g++ -std=c++17 -x c++ -include cmath -c "$here/loop.cu" -o "$here/loop.o"
  if printed=$("$nvcc" -std=c++17 -gencode arch=compute_90a,code=sm_90a -c "$here/loop.cu" -o "$here/loop.o" 2>&1)
  then echo "$1: compiles"; else echo "$1: $(grep -m 1 -o "error: .*" <<< "$printed")"; fi
}

outcomes() {
  local loop
  for loop in "for (; p.round < n; ++p.round) {}" "for (; p.pow < n; ++p.pow) {}" \
    "for (; p.count < n; ++p.count) {}" "while (p.round < n) ++p.round;" "for (; (p.round) < n; ++p.round) {}"
  do outcome "$loop"; done
}

install_nvcc 13.0.88 13.0.96
output=$(outcomes)
echo "$output"
expect "$output" '^for \(; p\.round < n; \+\+p\.round\) \{\}: error: expected a ">"$'
expect "$output" '^for \(; p\.pow < n; \+\+p\.pow\) \{\}: error: expected a ">"$'
expect "$output" '^for \(; p\.count < n; \+\+p\.count\) \{\}: compiles$'
expect "$output" '^while \(p\.round < n\) \+\+p\.round;: compiles$'
expect "$output" '^for \(; \(p\.round\) < n; \+\+p\.round\) \{\}: compiles$'

install_nvcc 13.5.37 13.5.37
output=$(outcomes)
echo "$output"
refuse "$output" 'error'
