"""One layer at a time: what is written down is what replacing that layer costs; a run goes on where it stopped."""

import math
from dataclasses import replace

import pytest

from compression.small import planned
from mea.compression import profile as module
from mea.compression.api import run_plans
from mea.compression.budget import Layout
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import calibration_tokens, held_out_tokens
from mea.compression.options import CompressOptions
from mea.compression.profile import profile
from mea.evaluate.perplexity import ratio, token_losses
from mea.models.loading import load
from mea.records import read_record

OPTIONS = {"tokens": 256, "window": 64, "dtype": "float32"}


@pytest.fixture
def record(saved, calibration, tmp_path):
    return profile(
        str(saved), tmp_path / "profile.json", CompressOptions(method="post_rope", calibration=calibration), **OPTIONS
    )


def test_a_layer_adds_what_compressing_it_alone_adds(record, saved, calibration):
    model, tokenizer = load(str(saved), "float32")
    plan = planned(model.config, keep=0.5, calibration=calibration)
    alone = Layout((None, plan.layout.ranks[1], None))
    tokens = calibration_tokens(tokenizer, calibration)
    (compressed,) = run_plans(LayerWalk(model), tokens, [replace(plan, layout=alone)])
    text = held_out_tokens(tokenizer, calibration, 256, 64).flatten()
    expected = ratio(token_losses(compressed.model, text, 64), token_losses(model, text, 64))
    found = record["results"]["layers"][1]
    assert found["added"] == pytest.approx(math.log(expected.value), abs=1e-5)
    assert found["standard_error"] == pytest.approx(expected.standard_error / expected.value, rel=1e-3)
    assert found["relative_output_error"] == pytest.approx(compressed.layers[1], rel=1e-4)


def test_an_interrupted_run_goes_on_with_the_layer_that_is_missing(record, saved, calibration, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(_what, done, _of):
        if done == 2:
            raise Stop

    out = tmp_path / "other.json"
    with pytest.raises(Stop):
        profile(str(saved), out, CompressOptions(method="post_rope", calibration=calibration), progress=stop, **OPTIONS)
    assert len(read_record(out)["results"]["layers"]) == 2
    fitted = []
    fit = module.fit_layers

    def watched(*arguments):
        for found in fit(*arguments):
            fitted.extend(x.index for x in found if x.factors is not None)
            yield found

    monkeypatch.setattr(module, "fit_layers", watched)
    again = profile(str(saved), out, CompressOptions(method="post_rope", calibration=calibration), **OPTIONS)
    assert fitted == [2]
    assert again["results"]["layers"] == record["results"]["layers"]
    monkeypatch.setattr(module, "load", None)  # a finished run is not made again
    assert profile(str(saved), out, CompressOptions(method="post_rope", calibration=calibration), **OPTIONS) == again


def test_another_run_is_not_written_over(record, saved, calibration, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        profile(
            str(saved),
            tmp_path / "profile.json",
            CompressOptions(keep=0.75, method="post_rope", calibration=calibration),
            **OPTIONS,
        )
