#!/usr/bin/env bash
# Decoding time of compressed and quantised caches. Run at the root of the repository on an idle machine: run.sh [MODEL]
set -euo pipefail
MODEL=${1:-$(python -c 'from mea.models.loading import packaged_model; print(packaged_model())')}
mea compare "$MODEL" experiments/decode_time --method shared --method post_rope --method pre_rope --keep 0.5 \
  --bits 8 --bits 4 --tokens 1024 --calibration-tokens 4096 --dtype bfloat16
