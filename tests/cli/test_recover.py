"""``mea recover``: from a compressed folder to a compressed folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mea.compression.budget import Layout
from mea.compression.convert import LayerFactors, assemble, latent_config
from mea.models.loading import load
from tiny_models import Factors
from two_processes import run_on_two


def halved(folder: str, out: str) -> str:
    """Half of the cache, with random factors: something to recover from."""
    model, tokenizer = load(folder)
    torch.manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:8] for _ in range(4)]
    pairs = [LayerFactors(Factors(k, k.T), Factors(v, v.T)) for k, v in (bases[:2], bases[2:])]
    made = assemble(model, pairs, latent_config(model.config, Layout(((8, 8),) * 2), {}))
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_a_compressed_folder_is_trained_into_one_that_loads(models_, text, tmp_path, mea):
    start = halved(models_["a"], str(tmp_path / "half"))
    small = ["--window", 16, "--batch", 2, "--micro-batch", 2, "--tokens", 128, "--held-out", 32]
    arguments = ["recover", start, tmp_path / "out", "--original", models_["a"], "--text", text]
    arguments += [*small, "--precision", "float32", "--measure", 0]
    found = mea(*arguments)
    assert found.exit_code == 0, found.stderr
    assert "128 tokens in 4 steps" in found.stderr
    assert "about 1 minute on" in " ".join(found.stderr.split())
    record = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert record["results"]["held_out"]["ce"] <= record["results"]["held_out_start"]["ce"]
    assert record["config"]["texts"] == ["text.txt"]
    assert load(str(tmp_path / "out"))[0].config.latent_ranks == [[8, 8], [8, 8]]
    assert not (tmp_path / "out.partial").exists()

    assert "not an empty folder" in mea(*arguments).stderr
    assert "--rate was renamed: give --lr" in mea(*arguments, "--rate", 1e-3).stderr
    shutil.rmtree(tmp_path / "out")
    assert "--stage distill --lr 3e-4" in mea(*arguments, "--stage", "near").stderr
    arguments[1] = models_["a"]
    assert "not compressed" in mea(*arguments).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_do_what_one_does(models_, text, tmp_path, mea, sharded):
    start = halved(models_["a"], str(tmp_path / "half"))
    options = ["--original", models_["a"], "--text", text, "--window", 16, "--batch", 4, "--micro-batch", 2]
    options += ["--tokens", 192, "--held-out", 32, "--precision", "float32", "--measure", 0]
    alone = mea("recover", start, tmp_path / "alone", *options)
    assert alone.exit_code == 0, alone.stderr
    program = Path(sys.executable).with_name("mea")
    options += ["--shard"] if sharded else []
    run_on_two("--no-python", program, "recover", start, tmp_path / "together", *options)

    both = [json.loads((tmp_path / name / "recovery.json").read_text()) for name in ("alone", "together")]
    # The same windows; only the order in which fp32 gradients are summed differs, over 3 steps.
    for kind in ("losses", "curves"):
        points = [record["samples"][kind][0] for record in both]
        assert len(points[0]) > 2
        for one, other in zip(*points, strict=True):
            assert other == pytest.approx(one, rel=1e-4)
    states = [load(str(tmp_path / name))[0].state_dict() for name in ("alone", "together")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item())
