"""Records come back as they were written, are complete or absent, and tell nothing about whose machine it was."""

import json
import math
import os
import platform
import subprocess

import pytest

from mea import records
from mea.records import make_record, mean_bits, read_record, read_records, write_record


def example(**changes):
    config = {"model": "tiny", "keep": 0.5, "ranks": (96, 96)}
    return (
        make_record("test", config, results={"ratio": 1.5}, samples={"seconds": [0.1, 0.2]}, seeds={"data": 3})
        | changes
    )


def test_round_trip(tmp_path):
    record = example()
    assert read_record(write_record(tmp_path / "deep" / "a.json", record)) == record
    assert record["config"]["ranks"] == [96, 96]
    assert record["samples"] == {"seconds": [0.1, 0.2]}
    assert record["versions"]["torch"]
    assert record["machine"]["cores"] == os.cpu_count()


def test_folder_sorted_and_filtered(tmp_path):
    for name, kind in (("b", "other"), ("a", "test"), ("c", "test")):
        write_record(tmp_path / f"{name}.json", example(kind=kind, date=name))
    assert [record["date"] for record in read_records(tmp_path)] == ["a", "b", "c"]
    assert [record["date"] for record in read_records(tmp_path, "test")] == ["a", "c"]
    with pytest.raises(FileNotFoundError, match="no folder of records"):
        read_records(tmp_path / "none")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_record(tmp_path / "a.json", example(date="old"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_record(path, example(date="new"))
    assert read_record(path)["date"] == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_nothing_tells_whose_machine_it_was(tmp_path):
    config = {"model": str(tmp_path / "secret" / "smol"), "files": [tmp_path / "x.gguf"], "windows": "C:\\Users\\me\\m"}
    record = make_record("test", config)
    assert record["config"] == {"model": "smol", "files": ["x.gguf"], "windows": "m"}
    assert str(tmp_path) not in json.dumps(record)
    assert platform.node() not in record["machine"].values()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": {"a": [1.0, float("nan")]}}, r"results\.a\[1\] is nan"),
        ({"samples": {"s": object()}}, r"samples\.s is a object"),
        ({"config": {1: 2}}, "must be text"),
        ({"kind": 3}, "'kind' may not be int"),
        ({"format": 99}, "format 99, this version reads format 1"),
    ],
)
def test_invalid_records_are_not_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_record(tmp_path / "a.json", example(**change))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "not list"), ("{}", "'format' is missing")])
def test_reading_something_else(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


def test_commit_is_that_of_this_checkout():
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=records.Path(__file__).parent, capture_output=True, text=True
    )
    if head.returncode:
        pytest.skip("not a git checkout")
    assert (records.commit() or "").removesuffix("+changes") == head.stdout.strip()


def test_no_commit_outside_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    assert records.commit() is None


def test_components_without_bits_are_never_below_zero():
    """Rounding of the means once left ``-0``, which tables printed."""
    tiers = [[[96, 16, 16]], [[96, 16, 16]], [[112, 16, 0]], [[96, 16, 16]], [[112, 16, 0]]]
    eight, four, two, none = mean_bits(tiers, 128)
    assert eight + four + two + none == pytest.approx(128)
    assert math.copysign(1, none) == 1
