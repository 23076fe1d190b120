"""The side-by-side comparison behind the demo, on a tiny model."""

import dataclasses

import pytest

from mea.compression import comparison
from mea.compression.comparison import Contender, Protocol, compare
from mea.report import rows

CONTENDERS = [Contender("position", "position"), Contender("svd", "svd"), Contender("svd, less", "svd", keep=0.25)]
PROTOCOL = Protocol(
    texts=(("technical", 512),), window=128, position_text="technical", positions=(0, 128, 256),
    prompt="The", new_tokens=4, decode_context=256, decode_steps=3, decode_dtype="float32",
)  # fmt: skip


@pytest.fixture
def records(saved, calibration, tmp_path):
    return compare(str(saved), tmp_path / "records", CONTENDERS, protocol=PROTOCOL, calibration=calibration)


def test_every_contender_is_measured_on_the_same_tokens(records):
    original, *compressed = records
    assert rows(records)[0].name == "uncompressed"
    for record, contender in zip(compressed, CONTENDERS, strict=True):
        size = record["results"]["cache"]["bytes_per_token"] / original["results"]["cache"]["bytes_per_token"]
        assert size == contender.keep
        text, reference = (r["results"]["texts"]["technical"] for r in (record, original))
        assert text["tokens"] == reference["tokens"]
        assert text["ratio"] == pytest.approx(text["perplexity"] / reference["perplexity"], rel=1e-6)
        assert len(record["samples"]["decode_seconds"]["uncompressed"]) == PROTOCOL.decode_steps


def test_second_run_reuses_the_records_and_a_changed_one_does_not(records, saved, calibration, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(comparison, "load", fail)
    again = compare(str(saved), tmp_path / "records", CONTENDERS, protocol=PROTOCOL, calibration=calibration)
    assert again == records
    other = dataclasses.replace(PROTOCOL, window=64)
    with pytest.raises(AssertionError, match="loaded"):
        compare(str(saved), tmp_path / "records", CONTENDERS, protocol=other, calibration=calibration)
