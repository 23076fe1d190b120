#!/usr/bin/env bash
# As many groups as key/value heads. Run at the root of the repository: run.sh [MODEL]
set -euo pipefail
MODEL=${1:-$(python -c 'from mea.models.loading import packaged_model; print(packaged_model())')}
python experiments/make_baseline.py "$MODEL" build/head_groups post_rope --groups 3 --measure 20480
cp build/head_groups/compression.json experiments/head_groups/records/three-groups.json
