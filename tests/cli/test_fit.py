"""``mea fit`` prints and writes what the library finds, and answers mistakes with one line."""

import pytest

from mea.records import make_record, read_record, write_record
from mea.scaling import FitSettings, fit_records
from synthetic_runs import sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of a sweep's records, some of them further down, among files that are none."""
    folder = tmp_path_factory.mktemp("sweep")
    for index, record in enumerate(sweep()):
        write_record(folder / ("more" if index % 2 else ".") / f"{index:02}.json", record)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_prints_every_answer_and_writes_the_record(mea, runs, tmp_path):
    out = tmp_path / "new" / "fit.json"
    result = mea("fit", runs, "--draws", 200, "--seed", 3, "--record", out)
    assert result.exit_code == 0, result.output
    record = read_record(out)
    again = fit_records([*sweep()[::2], *sweep()[1::2]], FitSettings(draws=200, seed=3))
    assert record["results"] == again["results"]
    for heading in (
        "Learning rates",
        "Differences between variants",
        "Losses and stability",
        "Fits of loss",
        "Does the fit",
    ):
        assert heading in result.stdout
    best = record["results"]["groups"]["constant"]["arms"][0]
    assert f"{best['loss']:.3f}" in result.stdout
    assert "fits (constant)" in result.stderr


def test_mistakes_are_told_in_one_line(mea, runs, tmp_path):
    for arguments, message in (
        ((tmp_path / "gone",), "there is nothing at"),
        ((runs, "--draws", 5), "draws is 5; an interval needs 100 or more"),
        ((runs / "config.json",), "the field 'format' is missing"),
    ):
        result = mea("fit", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    (tmp_path / "empty").mkdir()
    assert "no record in" in mea("fit", tmp_path / "empty").stderr
    write_record(tmp_path / "other.json", make_record("speed", {}))
    assert "no record of the kind 'pretraining' among 1" in mea("fit", tmp_path / "other.json").stderr


def test_a_record_cut_short_is_not_passed_over(mea, runs, tmp_path):
    whole = (runs / "00.json").read_text()
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    assert "is not JSON" in mea("fit", tmp_path).stderr
