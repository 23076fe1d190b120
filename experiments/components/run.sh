#!/usr/bin/env bash
# Models trained with less cache, and a trained Transformer compressed. Run at the root of the repository:
# run.sh BOOKS OTHER, two files of plain books; the work is kept in build/components.
set -euo pipefail
BOOKS=$1 OTHER=$2 OUT=experiments/components WORK=build/components
mkdir -p $WORK
mea sweep $OUT/sweep.toml $OUT/records --text "$BOOKS" --work $WORK/sweep

head -c 1000000 "$BOOKS" > $WORK/calibration.txt
head -c 1000000 "$OTHER" > $WORK/other.txt
measure() { mea perplexity "$1" --against "$MODEL" --text $WORK/other.txt --window 256 --tokens 65536 "${@:2}"; }
for SEED in 0 1 2; do
  sed "s|BOOKS|$BOOKS|; s|^seed = .*|seed = $SEED|" $OUT/transformer.toml > $WORK/transformer-$SEED.toml
  MODEL=$WORK/transformer-$SEED/model
  mea pretrain $WORK/transformer-$SEED.toml $WORK/transformer-$SEED --record $OUT/records/transformer-0.0025-$SEED.json
  for METHOD in predictive joint; do
    for SIZE in 50:5 25:2.5 14:1.4; do # % of the bytes, and what that is for 8,192 tokens
      NAME=$METHOD-${SIZE%:*}-$SEED
      mea compress $MODEL $WORK/$NAME --method $METHOD --budget "8k tokens in ${SIZE#*:} MiB" --measure 0 \
        --calibration-text $WORK/calibration.txt --calibration-window 256
      # Windows of 256 tokens are short beside the newest 64, which are kept exactly: here all but one are read by codes.
      sed -i 's/"recent": 64/"recent": 1/' $WORK/$NAME/config.json
      measure $WORK/$NAME --record $OUT/records/$NAME.json
    done
  done
  measure $MODEL --cache-bits 4 --record $OUT/records/bits-4-$SEED.json
done
mea report $OUT/records --markdown $OUT/README.md
