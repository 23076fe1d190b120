#!/usr/bin/env bash
# What needs a GPU, in one run of about 8 minutes: tests, decoding, compressing, training steps. Records go to OUT.
#   benchmarks/gpu.sh OUT [PYTHON]
# PYTHON has this package with its extra `gpu` and a CUDA build of torch. Without a GPU it says so and does nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?"give a folder for the records"} PYTHON=${2:-python}
export PYTHONPATH=src HF_HUB_OFFLINE=1
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "GPU part: no GPU is visible, nothing is measured"
  exit 0
}
"$PYTHON" -c 'import mea, torch, triton; print(torch.__version__, triton.__version__)' || exit 1
mkdir -p "$OUT"
failed=()
part() { # a name and a command; the others run if it fails
  echo "== $1"; local start=$SECONDS
  timeout 240 "${@:2}" 2>&1 | tee "$OUT/$1.log" || failed+=("$1")
  echo "== $1: $((SECONDS - start)) s"
}
part tests "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
part decode_gpu "$PYTHON" benchmarks/decode_gpu.py --out "$OUT/decode_gpu.json"
MODEL=$("$PYTHON" -c 'from mea.models.loading import packaged_model; print(packaged_model())')
MEA=("$PYTHON" -c 'from mea.cli import app; app()')
part compress "${MEA[@]}" compress "$MODEL" "$OUT/compressed" --device cuda --dtype bfloat16
cp "$OUT/compressed/compression.json" "$OUT/compress_gpu.json"
part generate "${MEA[@]}" generate "$OUT/compressed" "The sea" --device cuda
rm -rf "$OUT/compressed"
part training_step "$PYTHON" benchmarks/training_step.py --only time --out "$OUT/training_step_gpu.json"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
