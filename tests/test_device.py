"""Models work where they are put; without a GPU, on a device that is pretended."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mea.models.loading import load, use_device

SCRIPT = Path(__file__).with_name("elsewhere.py")


@pytest.mark.parametrize("method", ["predictive", "joint"])
def test_compress_generate_and_evaluate_mix_no_devices(saved, method):
    run = subprocess.run([sys.executable, str(SCRIPT), method, str(saved)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="device"):
        use_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_model_is_loaded_onto_the_gpu(saved):
    use_device("cuda")
    try:
        assert load(str(saved))[0].device.type == "cuda"
    finally:
        use_device("cpu")
