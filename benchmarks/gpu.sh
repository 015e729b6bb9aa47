#!/usr/bin/env bash
# Everything that needs a GPU: build in place, GPU tests, compute-sanitizer, GPU benchmarks. Needs no network: the
# machine's own python3 with torch, triton, pybind11, ninja, pytest, and nvcc.
#
#   benchmarks/gpu.sh              every step, about half an hour at most
#   benchmarks/gpu.sh build tests  some of them, where a command may take ten minutes only: then build tests, benchmarks,
#                                  memcheck racecheck initcheck, triton, suite, in this order of worth
#
# A failing step does not stop the others. Results go to benchmarks/results/; where $OUT is another folder, that gets
# few files after each step: the tables, and everything with the logs in gpu.tgz.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
RESULTS=benchmarks/results
OUT=${OUT:-$RESULTS}
LOGS=build/gpu-logs
mkdir -p "$OUT" "$LOGS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PATH="$PATH:$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"  # ninja's
failed=()

save() {
  [ "$OUT" -ef "$RESULTS" ] && return
  tar -czf "$OUT/gpu.tgz" "$RESULTS" "$LOGS" benchmarks/REPORT.md
  cp benchmarks/REPORT.md "$OUT"
  cp $RESULTS/gpu.json $RESULTS/gpu.md "$OUT" 2>/dev/null || true
}

step() {  # step NAME SECONDS COMMAND...: an interrupt in place of the limit's kill, so that pytest tells what failed
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout -s INT -k 20 "$limit" "$@" 2>&1 | tee "$LOGS/$name.log" | tail -n 25
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
  save
}

pytest() {  # pytest NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short "$@"
}

sanitize() {  # without torch's cache of memory, or a read past a tensor falls into the next one
  if command -v compute-sanitizer >/dev/null; then
    local options=()
    [ "$1" != memcheck ] || options=(--report-api-errors no) # of torch's own probing; ours are checked by the kernels' callers
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 150 \
      compute-sanitizer --tool "$1" "${options[@]}" --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_sanitize
  else
    echo "compute-sanitizer is not installed: $1 not run"
    failed+=("$1")
  fi
}

build() {  # in a folder without pyproject.toml, which a setuptools older than 77 does not read
  rm -rf build/gpu && mkdir -p build/gpu/snnfast && cp -r setup.py csrc build/gpu &&
    (cd build/gpu && "$PYTHON" setup.py build_ext --inplace) && cp build/gpu/snnfast/_C* snnfast/
}
export -f build

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L; then
  echo "make gpu needs a machine with an NVIDIA GPU; there is none here. make test and make bench need none."
  exit 1
fi
export SNNFAST_CUDA_ARCHS=${SNNFAST_CUDA_ARCHS:-$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
workers=$($PYTHON -c 'import importlib.util as u; print("-n 12" if u.find_spec("xdist") else "")')
[ $# -gt 0 ] || set -- build tests benchmarks memcheck racecheck initcheck triton suite
for name in "$@"; do
  case $name in
    build)
      step build 240 bash -c build
      step versions 60 "$PYTHON" -m snnfast
      ;;
    tests)  # the native kernels
      pytest tests-gpu 150 tests/test_gpu_bn.py tests/test_gpu.py tests/test_memory.py tests/test_inference.py \
        -k "gpu and not triton"
      OMP_NUM_THREADS=1 pytest tests-parity 180 $workers tests/test_parity.py tests/test_torch.py -k "native and cuda"
      ;;
    benchmarks) step benchmarks 240 "$PYTHON" -m benchmarks.gpu ;;
    memcheck | racecheck | initcheck) sanitize "$name" ;;
    triton)  # each case is a compilation, so not the whole of test_parity.py
      OMP_NUM_THREADS=1 pytest tests-triton 300 $workers tests/test_gpu_bn.py tests/test_gpu.py -k triton
      OMP_NUM_THREADS=1 pytest tests-triton-parity 200 $workers tests/test_parity.py -k "forward_has and triton and cuda and float32"
      ;;
    suite)  # one at a time: each writes when it ends. --force: the CPU's load says little about the GPU
      for sub in network open_neuromorphic scaling inference overhead; do
        step "suite-$sub" 120 "$PYTHON" -m benchmarks "$sub" --device cuda --force
      done
      ;;
    *)
      echo "unknown step $name: build tests benchmarks memcheck racecheck initcheck triton suite"
      exit 2
      ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]} (logs in $LOGS)"
  exit 1
fi
echo "all GPU steps passed; results in $RESULTS"
