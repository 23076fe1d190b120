"""Whole evaluations of tiny models: records, samples, what is resumed, what is refused before weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest

from mea.evaluate import runner
from mea.evaluate.harness.model import PackedLM
from mea.evaluate.harness.run import HarnessTasks, compare, numbers
from mea.evaluate.runner import evaluate
from mea.records import read_record

DATA = str(Path(__file__).parents[1] / "data")
PLAN = HarnessTasks("zero-shot", ("piqa", "arc_easy"), DATA, limit=6, batch_tokens=1024)


@pytest.fixture(scope="module")
def folders(two_models):
    return two_models(1024)


@pytest.fixture
def unloaded(monkeypatch):
    """Weights must not be read."""
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("weights were loaded"))


def test_two_models_are_compared_on_the_same_items(folders, tmp_path):
    seen = []
    records = evaluate(
        str(folders / "first"),
        PLAN,
        tmp_path,
        against=str(folders / "second"),
        progress=lambda *told: seen.append(told),
    )
    assert [record["kind"] for record in records] == ["task"] * 4 + ["paired tasks"]
    assert {what for what, *_ in seen} == {"loading first", "loading second", "piqa", "arc_easy"}
    assert all(0 < done <= total for what, done, total in seen if "loading" not in what)
    scores = [numbers(record["samples"]["acc"]) for record in records[:4]]
    assert [len(score) for score in scores] == [6] * 4
    paired = records[-1]["results"]
    for task, mine, theirs in (("piqa", scores[0], scores[2]), ("arc_easy", scores[1], scores[3])):
        expected = sum(a - b for a, b in zip(mine, theirs, strict=True)) / 6
        assert paired["tasks"][task]["acc"]["difference"] == pytest.approx(expected)
    assert read_record(tmp_path / "paired-first-second.json") == records[-1]
    lines = (tmp_path / "samples" / "first-piqa.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [float(sample["acc"]) for sample in samples] == scores[0]
    assert "Question:" in json.dumps(samples[0]["asked"])
    assert len(samples[0]["answered"]) == 2


def test_finished_tasks_and_answers_are_not_repeated(folders, tmp_path, monkeypatch):
    """The first run is interrupted after its first batch of the second task; the second asks for the rest only."""
    asked = []
    whole = PackedLM._loglikelihood_tokens

    def count(self, requests, **options):
        asked.append(len(requests))
        return whole(self, requests, **options)

    monkeypatch.setattr(PackedLM, "_loglikelihood_tokens", count)

    def interrupt(what, done, total):
        if what == "arc_easy":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(str(folders / "first"), PLAN, tmp_path, progress=interrupt)
    complete = evaluate(str(folders / "first"), PLAN, tmp_path)
    piqa, before, after = asked
    assert (piqa, before) == (12, 24)
    assert 0 < after < before
    assert complete[1]["results"]["answers_kept_from_before"] == before - after
    again = evaluate(str(folders / "first"), PLAN, tmp_path)
    assert again == complete
    assert len(asked) == 3
    afresh = evaluate(str(folders / "first"), PLAN, tmp_path / "afresh")
    assert [record["samples"] for record in afresh] == [record["samples"] for record in complete]


def test_another_model_under_the_same_name_is_evaluated_anew(folders, tmp_path):
    (first,) = evaluate(str(folders / "first"), HarnessTasks(None, ("piqa",), DATA, 3), tmp_path, label="same")
    (second,) = evaluate(str(folders / "second"), HarnessTasks(None, ("piqa",), DATA, 3), tmp_path, label="same")
    assert first["config"]["weights"] != second["config"]["weights"]


def test_other_rows_are_not_compared(folders, tmp_path):
    few, more = (
        evaluate(str(folders / "first"), HarnessTasks(None, ("piqa",), DATA, limit), tmp_path / str(limit))
        for limit in (3, 4)
    )
    with pytest.raises(ValueError, match="not evaluated on the same rows of piqa"):
        compare(few, more)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (HarnessTasks("zero-shit"), "did you mean 'zero-shot'"),
        (HarnessTasks(None, ("hellaswg",)), "did you mean 'hellaswag'"),
        (HarnessTasks("zero-shot", (), DATA, limit=0), "must be positive, not 0"),
        (HarnessTasks("math", (), DATA), "cannot be read from local files"),
        (HarnessTasks("zero-shot", (), "/nowhere"), "no data folder"),
        (HarnessTasks("zero-shot", (), DATA, dtype="float8"), "dtype is one of"),
    ],
)
def test_mistakes_are_found_before_weights_are_loaded(folders, tmp_path, unloaded, plan, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(str(folders / "first"), plan, tmp_path)


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path, unloaded):
    shutil.copytree(folders / "first", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="tokens up to 257, its model 100 in all"):
        evaluate(str(tmp_path / "model"), PLAN, tmp_path)
