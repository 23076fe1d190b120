#!/usr/bin/env bash
# All methods at half of the cache, and the README's table from the records. Run at the root of the repository.
set -euo pipefail
mea demo --refined --out experiments/smollm2
mea report experiments/smollm2/records --markdown experiments/smollm2/README.md
python scripts/readme.py
