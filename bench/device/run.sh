#!/usr/bin/env bash
# What is run on a GPU, in steps that each end within the time said here, whatever happens:
#
#   bench/device/run.sh tests [pytest arguments]       560 s  every test that needs a GPU
#   bench/device/run.sh bwd [benchmark arguments]      570 s  backward: check, then beside its peers, then its accuracy
#   bench/device/run.sh bench [suite arguments]        570 s  every benchmark and the report, as `make bench`
#   bench/device/run.sh sanitize [case ...]            560 s  compute-sanitizer's four tools on small backwards
#   bench/device/run.sh profile [SHAPE [options]]      300 s  ncu on one training step
#
# Needs kda_cuda/_ops.so, built for this GPU anywhere, and a python3 with torch and pytest. Wheels of peers in
# build/device/wheels are unpacked into $SITE; build/device/fla_autotune.tgz, which an earlier `bwd` left in $OUT, saves
# fla's tuning. Logs and results go to $OUT; a short table is printed last. KDA_CUDA_COMMIT names the commit, if there
# is no git. Nothing here touches the settings of the GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
OUT=${OUT:-$ROOT/build/device/out}
PYTHON=${PYTHON:-python3}
WORKERS=${WORKERS:-$(($(nproc) > 14 ? 14 : $(nproc)))}
CACHE=${CACHE:-${TMPDIR:-/tmp}/kda_device}
SITE=$CACHE/site
export TRITON_CACHE_DIR=$CACHE/triton CUDNN_FRONTEND_CAKE_CACHE_DIR=$CACHE/cudnn
export PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT:$SITE${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT" "$SITE" "$TRITON_CACHE_DIR"
failures=0

# limited SECONDS LOG COMMAND...: both streams to a log, a line of how it went; what is late is ended.
limited() {
  local seconds=$1 log=$2 begin=$SECONDS status=0
  shift 2
  timeout -k 5 "$seconds" "$@" >"$OUT/$log" 2>&1 || status=$?
  local verdict="ok"
  [ "$status" = 0 ] || verdict="FAILED ($status)"
  [ "$status" = 124 ] && verdict="ENDED after $seconds s"
  [ "$status" = 0 ] || failures=$((failures + 1))
  printf '%-14s %-20s %4d s\n' "${log%.log}" "$verdict" "$((SECONDS - begin))"
  return "$status"
}

need_kernels() {
  "$PYTHON" - <<'PY' || exit 2
import sys
import torch, kda_cuda
if not torch.cuda.is_available():
    sys.exit("run.sh: torch sees no GPU, expected one")
if not kda_cuda.build_info()["ops"]:
    sys.exit("run.sh: kda_cuda/_ops.so is missing, expected it beside the package, built for this GPU")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, python {sys.version.split()[0]}")
PY
}

# unpack_wheels [PATTERN]: all but those whose names match.
unpack_wheels() {
  local wheels=("$ROOT"/build/device/wheels/*.whl)
  [ $# = 0 ] || mapfile -t wheels < <(printf '%s\n' "${wheels[@]}" | grep -vE "$1")
  [ -e "${wheels[0]}" ] || { echo "no wheels in build/device/wheels: peers that are not installed are left out"; return; }
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "${wheels[@]}" \
    || echo "the wheels could not be unpacked: their peers are left out"
}

step_tests() {
  local parallel=()
  unpack_wheels '/(fla_core|flash_linear)'  # with it transformers would compile Triton kernels in the tests of parity
  "$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n "${TEST_JOBS:-12}" --dist worksteal)
  export OMP_NUM_THREADS=1  # every test has an oracle on the CPU, whose threads would stand in each other's way
  # A test that waits for ever says where in the log: a kernel that hangs is found by the test that launched it.
  limited 540 tests.log "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider -o faulthandler_timeout=150 --durations=8 \
    "${parallel[@]}" "$@"
  grep -oE 'File "[^"]*", line [0-9]+ in test_\w+' "$OUT/tests.log" | sort | uniq -c
  grep -E "^(FAILED|ERROR)|^E  " "$OUT/tests.log" | cut -c1-160 | head -40
  tail -n 4 "$OUT/tests.log"
}

compile_peers() {
  local cudnn compile=("$PYTHON" -m bench.python.peers compile-fla --backward --workers "$WORKERS")
  timeout -k 5 120 "$PYTHON" -m bench.python.peers compile-cudnn >"$OUT/compile_cudnn.log" 2>&1 &
  cudnn=$!
  if [ -f build/device/fla_autotune.tgz ] && tar xzf build/device/fla_autotune.tgz -C "$TRITON_CACHE_DIR"; then
    limited 120 compile_fla.log "${compile[@]}" --tuned || limited 180 compile_fla.log "${compile[@]}"
  else
    limited 270 compile_fla.log "${compile[@]}"
  fi
  wait "$cudnn" || { echo "cudnn-frontend: $(tail -n 1 "$OUT/compile_cudnn.log" | cut -c1-160)"; failures=$((failures + 1)); }
}

step_bwd() {
  limited 90 check.log "$PYTHON" -m bench.device.backward cases || { tail -n 12 "$OUT/check.log"; return; }
  unpack_wheels
  compile_peers
  local left=$((480 - SECONDS)) tuned
  limited $((left > 60 ? left : 60)) bench.log "$PYTHON" -m bench.python.bench_chunk_bwd --out "$OUT/chunk_bwd.json" "$@"
  tuned=$(cd "$TRITON_CACHE_DIR" && find . -name '*.autotune.json')
  [ -z "$tuned" ] || tar czf "$OUT/fla_autotune.tgz" -C "$TRITON_CACHE_DIR" -T - <<<"$tuned"
  limited 80 accuracy.log "$PYTHON" -m bench.python.accuracy_peers --out "$OUT/accuracy_peers.json"
  echo; cut -c1-220 "$OUT/accuracy.log" | tail -n 20
  echo; cut -c1-220 "$OUT/bench.log" | tail -n 50
}

step_bench() {
  unpack_wheels
  limited 560 suite.log "$PYTHON" -m bench.python.suite --out "$OUT/performance" "$@"
  echo; grep -E "^===|FAILED|LEFT OUT" "$OUT/suite.log" | cut -c1-220
}

step_sanitize() {
  local tool tools=(memcheck racecheck synccheck initcheck) ids=() ours=() filter names=()
  [ $# = 0 ] || names=(--names "$@")
  compute-sanitizer --help 2>&1 | grep -q -- "--kernel-regex" && ours=(--kernel-regex kns=kda)
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that every tensor is an allocation of its own
  if nvcc -std=c++17 -O3 -arch=sm_90 -lineinfo -Icsrc bench/device/handover.cu -o "$CACHE/handover" 2>"$OUT/handover.log"; then
    compute-sanitizer --tool racecheck "$CACHE/handover" >"$OUT/handover.log" 2>&1
    echo "control    racecheck of a hand-over without a hazard: $(grep SUMMARY "$OUT/handover.log" | cut -c11-)"
  else
    echo "control    no nvcc: whether racecheck follows bar.arrive was not tried"
  fi
  for tool in "${tools[@]}"; do
    filter=("${ours[@]}")
    [ "$tool" = initcheck ] && filter=()  # it must see who else wrote what ours read
    timeout -k 5 520 compute-sanitizer --target-processes all --tool "$tool" --error-exitcode 9 --print-limit 100 "${filter[@]}" \
      "$PYTHON" -m bench.device.backward cases "${names[@]}" >"$OUT/$tool.log" 2>&1 &
    ids+=($!)
  done
  for i in "${!tools[@]}"; do
    local status=0
    wait "${ids[$i]}" || status=$?
    [ "${tools[$i]} $status" = "racecheck 9" ] && "$PYTHON" -m bench.device.racecheck "$OUT/racecheck.log" && status=0
    [ "$status" = 0 ] || failures=$((failures + 1))
    printf '%-10s status %3d, %2d cases ok, %s\n' "${tools[$i]}" "$status" \
      "$(grep -cE '^[a-z_0-9]+ +ok$' "$OUT/${tools[$i]}.log")" "$(grep -E 'SUMMARY' "$OUT/${tools[$i]}.log" | tail -n 1 | cut -c11-)"
    grep -E "^=========  .*kda::" "$OUT/${tools[$i]}.log" | grep -oE "kda::\w+" | sort | uniq -c | sort -rn | head -n 4
    truncate -s "<8M" "$OUT/${tools[$i]}.log"
  done
}

step_profile() {
  local shape=${1:-T8192_H16_N1}
  shift || true
  limited 240 ncu.log ncu -f -o "$OUT/profile" --clock-control none --target-processes all --profile-from-start off \
    --kernel-name-base demangled -k "regex:kda::" --launch-count 60 --section SpeedOfLight --section LaunchStats \
    --section Occupancy --section SchedulerStats --section WarpStateStats --section ComputeWorkloadAnalysis \
    --section MemoryWorkloadAnalysis "$PYTHON" -m bench.device.backward shape "$shape" "$@" || tail -n 5 "$OUT/ncu.log"
  ncu --import "$OUT/profile.ncu-rep" --csv --page raw >"$OUT/profile.csv" || return
  "$PYTHON" -m bench.device.profile_table "$OUT/profile.csv" || failures=$((failures + 1))
}

step=${1:-}
case $step in
  tests | bwd | bench | sanitize | profile) shift ;;
  *) echo "run.sh: step is '$step', expected tests, bwd, bench, sanitize or profile" >&2; exit 2 ;;
esac
need_kernels
"step_$step" "$@"
echo "$step: $failures failures, $SECONDS s"
[ "$failures" = 0 ]
