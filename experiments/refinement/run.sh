#!/usr/bin/env bash
# The closed form, refined layer by layer. Run at the root of the repository: run.sh [MODEL]
set -euo pipefail
MODEL=${1:-$(python -c 'from mea.models.loading import packaged_model; print(packaged_model())')}
RECORDS=experiments/refinement/records
OPTIONS=(--calibration-tokens 65536 --refine 2)

baseline() { python experiments/make_baseline.py "$MODEL" "$@" "${OPTIONS[@]}"; }

baseline build/sensitivity post_rope:sensitivity --copy-fraction 0 --measure 20480
cp build/sensitivity/compression.json $RECORDS/sensitivity-64k.json
mea perplexity build/sensitivity --against "$MODEL" --text technical --tokens 4096 --dtype float32 \
  --record $RECORDS/sensitivity-64k-technical.json
mea perplexity build/sensitivity --against "$MODEL" --window 8192 --tokens 8192 --dtype float32 \
  --record $RECORDS/sensitivity-64k-8k.json
baseline build/mean post_rope
cp build/mean/compression.json $RECORDS/mean-64k.json
