#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build in place, GPU tests, compute-sanitizer, GPU benchmarks. Needs no
# network: the machine's own python3 with torch, triton, pybind11, ninja, pytest, and nvcc. Results go to
# $OUT (or benchmarks/results/); every step's log lies beside them, and a failing step does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/gpu-$name.log" | tail -n 15
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L; then
  echo "make gpu needs a machine with an NVIDIA GPU; there is none here. make test and make bench need none."
  exit 1
fi
export SNNFAST_CUDA_ARCHS=${SNNFAST_CUDA_ARCHS:-$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
step build 240 "$PYTHON" setup.py build_ext --inplace
step versions 60 "$PYTHON" -m snnfast
step tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_parity.py tests/test_torch.py tests/test_gpu.py tests/test_gpu_bn.py
if command -v compute-sanitizer >/dev/null; then
  step memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_sanitize
  step racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_sanitize
  step initcheck 120 compute-sanitizer --tool initcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_sanitize
else
  echo "compute-sanitizer is not installed: memory checks not run"
  failed+=(sanitizer-missing)
fi
step benchmarks 240 "$PYTHON" -m benchmarks.gpu --out "$OUT"
# --force: the CPU's load says little about the GPU. Peers that are not installed there are in the tables as missing.
step suite 420 "$PYTHON" -m benchmarks network overhead scaling inference open_neuromorphic --device cuda --force --out "$OUT"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]} (logs in $OUT)"
  exit 1
fi
echo "all GPU steps passed; results in $OUT"
