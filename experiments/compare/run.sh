#!/usr/bin/env bash
# Every way to a smaller cache at equal bytes. Run at the root of the repository:
# KVPRESS=PYTHON CACHESHRINK=PYTHON TRAINING_TEXT=FILE run.sh [MODEL]
set -euo pipefail
MODEL=${1:-$(python -c 'from mea.models.loading import packaged_model; print(packaged_model())')}
OUT=experiments/compare
compare() { mea compare "$MODEL" $OUT --tokens 8192 --decode-steps 0 --dtype bfloat16 "$@"; }

compare --method post_rope --keep 0.25 --keep 0.5 --keep 0.75 \
  --press ExpectedAttentionPress --press KeyDiffPress --kvpress "$KVPRESS"
compare --method joint --keep 0.5 --keep 0.75
compare --method joint --method pre_rope --keep 0.25 --keep 0.5 --keep 0.75 --bits 2 \
  --conversion separate --conversion xkv --cacheshrink "$CACHESHRINK"
compare --method svd --method gauge --keep 0.5 --bits 2
compare --method post_rope --method joint --method gauge --keep 0.5 --bits 2 \
  --recover-tokens 51200 --recover-text "$TRAINING_TEXT"
compare --method gqa-mean --method gqa-procrustes --keep 0.333334 --bits 2
mea report $OUT/records --markdown $OUT/README.md
