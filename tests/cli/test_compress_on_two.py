"""Two processes of torchrun, by gloo, compress and measure as one process does."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mea.models.loading import load
from two_processes import run_on_two


@pytest.fixture
def options(saved: Path, calibration: Any) -> list[Any]:
    options = ["--keep", 0.9, "--calibration-text", calibration.text, "--calibration-tokens", 320]
    return [saved, *options, "--calibration-window", 64, "--copy-fraction", 0, "--dtype", "float32", "--measure", 640]


@pytest.mark.slow
def test_two_processes_compress_as_one_does(saved: Path, options: list[Any], tmp_path: Path, mea: Any) -> None:
    """Five windows, three and two: moments are sums in another order, so that factors agree to some digits."""
    source, *rest = options
    alone = mea("compress", source, tmp_path / "alone", *rest)
    assert alone.exit_code == 0, alone.stderr
    run_on_two("--no-python", Path(sys.executable).with_name("mea"), "compress", source, tmp_path / "together", *rest)
    records = [json.loads((tmp_path / name / "compression.json").read_text()) for name in ("alone", "together")]
    assert records[0]["config"] == records[1]["config"]
    for name in ("perplexity_before", "perplexity"):
        one, other = (record["results"][name] for record in records)
        assert other == pytest.approx(one, rel=1e-4), name
    losses = [record["results"]["layer_expected_loss"] for record in records]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert not (tmp_path / "together.partial").exists()
    means = [load(str(tmp_path / name))[0].model.layers[0].self_attn.code.key_mean for name in ("alone", "together")]
    assert (means[0] - means[1]).abs().max() <= 1e-6 * means[0].abs().max().clamp_min(1)
