#!/usr/bin/env bash
# All methods at half of the cache. Run at the root of the repository.
set -euo pipefail
mea demo --refined --out experiments/smollm2
mea report experiments/smollm2/records --markdown experiments/smollm2/README.md
