"""Models work where they are put; without a GPU, on a device that is pretended."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mea.cli import app
from mea.models.loading import load
from mea.ops.device import use_device

SCRIPT = Path(__file__).with_name("elsewhere.py")


@pytest.mark.parametrize(
    ("what", "methods"),
    [
        ("compress", "predictive"),
        pytest.param("compress", "joint", marks=pytest.mark.slow),
        pytest.param("compress", "svd+post_rope+shared", marks=pytest.mark.slow),
        ("train", "predictive"),
        pytest.param("train", "svd", marks=pytest.mark.slow),
        ("stream", "predictive"),
        pytest.param("stream", "joint+svd", marks=pytest.mark.slow),
    ],
)
def test_compress_generate_evaluate_and_train_mix_no_devices(saved, what, methods):
    run_elsewhere(what, "elsewhere:0", methods, saved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    ("what", "methods"),
    [("compress", "predictive+joint"), ("compress", "svd+post_rope+shared"), ("train", "svd"), ("stream", "joint+svd")],
)
def test_so_they_do_on_a_gpu(saved, what, methods):
    run_elsewhere(what, "cuda:0", methods, saved)


def run_elsewhere(what, device, methods, folder):
    command = [sys.executable, str(SCRIPT), what, device, methods, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="device"):
        use_device(name)


@pytest.mark.parametrize(
    "command", ["compare", "compress", "eval", "generate", "perplexity", "pretrain", "profile", "recover", "sweep"]
)
def test_commands_refuse_such_a_device_before_they_read_anything(command):
    required = {"generate": ["--prompt", "a"], "recover": ["b", "--text", "technical"]}.get(command, ["b"])
    arguments = ["a"] if command in ("eval", "perplexity") else ["a", *required]
    result = CliRunner().invoke(app, [command, *arguments, "--device", "meta"])
    assert "no device 'meta' here" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_model_is_loaded_onto_the_gpu(saved):
    use_device("cuda")
    try:
        assert load(str(saved))[0].device.type == "cuda"
    finally:
        use_device("cpu")
