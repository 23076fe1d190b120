#!/usr/bin/env bash
# Ranks layer by layer against equal ranks and the paper's layouts. Run at the root of the repository: run.sh [MODEL]
set -euo pipefail
MODEL=${1:-$(python -c 'from mea.models.loading import packaged_model; print(packaged_model())')}
RECORDS=experiments/allocation/records
OPTIONS=(--dtype float32 --measure 0)

mea compress "$MODEL" build/uniform "${OPTIONS[@]}"
mea compress "$MODEL" build/exchanges --allocate "${OPTIONS[@]}"
for name in slopes prototype; do
  mea compress "$MODEL" build/$name --layout $RECORDS/layouts/$name.json "${OPTIONS[@]}"
done
for layout in half deep; do
  mea compress "$MODEL" build/$layout --layout $layout "${OPTIONS[@]}"
done
for percent in 55 75; do
  mea compress "$MODEL" build/exchanges-$percent --allocate --keep 0.$percent "${OPTIONS[@]}"
done
for name in exchanges exchanges-55 exchanges-75; do
  cp build/$name/compression.json $RECORDS/$name-tried.json
done
for name in uniform slopes exchanges prototype half deep exchanges-55 exchanges-75; do
  mea perplexity build/$name --against "$MODEL" --tokens 20480 --dtype float32 --record $RECORDS/$name.json
  mea perplexity build/$name --against "$MODEL" --text technical --tokens 8192 --dtype float32 \
    --record $RECORDS/$name-technical.json
done
