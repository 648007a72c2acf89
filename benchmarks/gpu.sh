#!/usr/bin/env bash
# `make gpu`: on a machine with a GPU, nvcc and torch, and no network: build in place, run the contract on the real kernels,
# compute-sanitizer, the benchmark. Every step runs even if one before it fails; the exit status tells whether all passed.
# JSON goes to benchmarks/results/<device>/, logs to ${OUT:-build/gpu}.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
failed=()

step() { # name, seconds allowed, command...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  echo "== $name"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  tail -n 12 "$out/$name.log"
  echo "== $name: status $status after $((SECONDS - begin)) s"
  [ "$status" -eq 0 ] || failed+=("$name")
}

export PYTHONUNBUFFERED=1
step build 150 env KX_CUDA=on KX_EMULATION=off "$python" setup.py build_ext --inplace
step primitives 120 bash -c 'cmake --preset gpu && cmake --build --preset gpu --target device_conformance &&
  build/gpu/tests/csrc/device_conformance'
for tool in memcheck racecheck synccheck; do
  step "primitives-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 build/gpu/tests/csrc/device_conformance
done
step machine 30 "$python" -m kx_kernels
step contract 200 "$python" -m pytest tests -q --maxfail=20 --ignore tests/test_csrc.py --ignore tests/test_codegen.py \
  -k "gpu or cuda-cuda or triton-cuda"
for tool in memcheck racecheck initcheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=kx \
    "$python" -m pytest tests/test_contract.py -q -p no:cacheprovider \
    -k "within_budget and cuda-cuda and (bfloat16 or float64) and (R6 or D128 or s128 or packed or cu_seqlens)"
done
operators=(--only rope --only linear_attention --only gau_attention --only nystrom_attention)
step measure 200 "$python" -m benchmarks measure --device cuda --seconds 170 "${operators[@]}"
step layers 100 "$python" -m benchmarks measure --device cuda --seconds 80 --only layers --only quality
mkdir -p "$out/results" && cp -r benchmarks/results/*/ "$out/results/" 2> /dev/null
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
