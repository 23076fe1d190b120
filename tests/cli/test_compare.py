"""``mea compare``, ``mea profile`` and mistakes of ``mea compress`` from the outside."""

import re
from pathlib import Path

import pytest

from mea.comparison import training
from mea.records import read_record, read_records
from mea.train.recovery.api import recover


def test_compare_writes_records_and_three_reports(mea, models_, text, tmp_path):
    options = ("--method", "post_rope:uniform", "--keep", 0.5, "--keep", 0.75, "--bits", 8, "--press", "KnormPress")
    options += ("--text", text, "--tokens", 256, "--window", 64, "--context", 40, "--decode-steps", 0)
    options += ("--calibration-tokens", 256, "--calibration-window", 64)
    result = mea("compare", models_["a"], tmp_path, *options)
    assert result.exit_code == 0, result.output
    labels = {record["config"]["label"] for record in read_records(tmp_path / "records")}
    assert {
        "uncompressed",
        "post_rope:uniform 0.5",
        "8 bits",
        "kvpress KnormPress 0.75",
    } <= labels
    for name in ("report.html", "report.md", "report.csv"):
        assert "Not run" in (tmp_path / name).read_text() or name == "report.csv"
    again = mea("compare", models_["a"], tmp_path, *options)
    assert again.exit_code == 0, again.output


def test_compare_measures_before_and_after_the_same_training(mea, models_, text, tmp_path, monkeypatch):
    def recorded(student, original, rows, held_out, settings, *args, **options):
        lrs[student.config.latent_form] = settings.lr
        return recover(student, original, rows, held_out, settings, *args, **options)

    lrs: dict[str, float] = {}
    monkeypatch.setattr(training, "recover", recorded)
    options = ("--method", "post_rope:uniform", "--method", "shared", "--keep", 0.5, "--bits", 8, "--decode-steps", 0)
    options += ("--text", text, "--tokens", 256, "--window", 64, "--context", 40)
    options += ("--calibration-tokens", 256, "--calibration-window", 64, "--recover-tokens", 2 * 64)
    Path(text).write_text(5 * Path(text).read_text())
    refused = mea("compare", models_["a"], tmp_path, *options)
    assert "--recover-text FILE" in refused.stderr
    result = mea("compare", models_["a"], tmp_path, *options, "--recover-text", text)
    assert result.exit_code == 0, result.output
    records = {record["config"]["label"]: record for record in read_records(tmp_path / "records")}
    assert lrs == {"post_rope": 5e-4, "joint": 1e-4}
    for method in ("post_rope:uniform", "shared"):
        before, after = records[f"{method} 0.5"], records[f"{method} 0.5, recovered"]
        assert after["config"]["recovery"]["steps"] == 2
        assert after["results"]["cache"] == before["results"]["cache"]
        folder = re.sub(r"\W|_", "-", f"{method} 0.5, recovered")
        assert list((tmp_path / "recovery" / folder).glob("checkpoint-*"))
    assert not any("8 bits, recovered" in label for label in records)


def test_profile_writes_its_record(mea, models_, text, tmp_path):
    options = ("--text", text, "--tokens", 128, "--window", 64, "--calibration-tokens", 256)
    options += ("--calibration-window", 64, "--dtype", "float32")
    result = mea("profile", models_["a"], tmp_path / "p.json", *options)
    assert result.exit_code == 0, result.output
    assert len(read_record(tmp_path / "p.json")["results"]["layers"]) == 2
    assert "added nats" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", 2), "groups is an option of methods that lower ranks, such as svd"),
        (("--method", "svd", "--groups", 3), "cannot be divided into 3 equal groups"),
        (("--method", "post_rope"), "post_rope is a baseline, which mea compare measures: give predictive or joint"),
        (("--method", "post_rope:uniform"), "or a whole-head method (svd, gauge, gqa-mean or gqa-procrustes)"),
        (("--method", "predictive:uniform"), "predictive:uniform is no method: give predictive or joint"),
    ],
)
def test_mistakes_are_one_line(mea, models_, tmp_path, options, message):
    result = mea("compress", models_["a"], tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
