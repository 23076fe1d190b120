#!/usr/bin/env bash
# Every way to a smaller cache at equal bytes. Run at the root of the repository:
# KVPRESS=PYTHON CACHESHRINK=PYTHON run.sh [MODEL]
set -euo pipefail
MODEL=${1:-$(python -c 'from mea.models.loading import packaged_model; print(packaged_model())')}
OUT=experiments/compare
compare() { mea compare "$MODEL" $OUT --tokens 4096 --decode-steps 0 --dtype bfloat16 "$@"; }
keep() { printf -- '--keep %s ' "$@"; }

compare --method predictive --method joint $(keep 0.14 0.2 0.28 0.4 0.6)
compare --method joint $(keep 0.08 0.1) --bits 2
compare --method predictive $(keep 0.14 0.2 0.28) --bits 2 \
  --press ExpectedAttentionPress --press KeyDiffPress --kvpress "$KVPRESS"
compare --method post_rope --method pre_rope --method shared $(keep 0.25 0.5) --bits 2 \
  --conversion separate --conversion xkv --cacheshrink "$CACHESHRINK" \
  --press ExpectedAttentionPress --press KeyDiffPress --kvpress "$KVPRESS"
compare --method gqa-mean --method gqa-procrustes $(keep 0.333334) --bits 2
compare --method svd --method gauge $(keep 0.5) --bits 2
compare --method joint $(keep 0.1) --bits 2 --backend hqq --backend quanto
mea report $OUT/records --markdown $OUT/README.md
