"""Every kernel compiles for GPUs that need not be there: no registers spill, and shared memory suffices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'mea[gpu]'")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Bytes that a block may share: CUDA programming guide, "Compute Capabilities".
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit_a_multiprocessor(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    for name, used in json.loads(run.stdout).items():
        assert used["spilled"] == 0, (name, used)
        assert used["shared"] <= SHARED[capability], (name, used)
