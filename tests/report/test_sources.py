"""Records with missing or mistyped fields are named by file and field; the others are rendered."""

import json

import pytest

from mea.records import make_record, write_record
from mea.report import find_records, make_sections
from mea.scaling import FitSettings, fit_records
from synthetic_runs import sweep

GONE = object()


@pytest.fixture(scope="module")
def fit():
    return fit_records(sweep(seeds=1), FitSettings(draws=200))


def changed(record, path, value):
    record = json.loads(json.dumps(record))
    *parents, last = path.split(".")
    place = record
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config.tokens", GONE),
        ("config.tokens", "many"),
        ("config.variant", None),
        ("config.settings", {"optim": 3}),
        ("results.diverged", "no"),
        ("samples.validation_loss", {"a": 1}),
        ("samples.validation_loss", [1.0]),
        ("samples.largest_logit", [[1.0]]),
    ],
)
def test_a_run_with_a_wrong_field(tmp_path, path, value):
    check(tmp_path, changed(sweep(seeds=1)[0], path, value), path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("results.groups", []),
        ("results.groups.constant.arms.0.loss", "low"),
        ("results.groups.constant.cells.1.interval", [1.0]),
        ("results.groups.constant.differences", GONE),
        ("config.held", GONE),
        ("samples.curves", None),
    ],
)
def test_a_fit_with_a_wrong_field(tmp_path, fit, path, value):
    check(tmp_path, changed(fit, path, value), path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("results.cache", "small"),
        ("results.texts", []),
        ("results.layers", {"values": [None]}),
        ("results.positions", [{"start": 0}]),
        ("results.decode", {"seconds": "fast"}),
        ("config.keep", "half"),
    ],
)
def test_a_comparison_with_a_wrong_field(tmp_path, one, path, value):
    check(tmp_path, changed(one("svd", 2.0), path, value), path)


def test_a_task_with_a_wrong_field(tmp_path):
    config = {"label": "m", "task": "piqa", "suite": None, "parameters": 1, "dtype": "float32", "limit": None}
    results = {"items": 3, "metrics": {"acc": {"mean": 0.5, "standard_error": 0.1}}, "main": None}
    check(tmp_path, make_record("task", config, results=results), "results.main")


@pytest.mark.parametrize("value", [7, {}, {"exact": []}, {"exact": [1.0], "choice": [None], "logprob": [0.0]}])
def test_long_context_samples_of_a_wrong_shape(tmp_path, value):
    samples = {"position": {"1024": [3.0]}, "needle": {"1024": value}}
    check(tmp_path, make_record("long context", {}, results={"cells": []}, samples=samples), "samples.needle.1024")


@pytest.mark.parametrize("value", [1e300, 10**400])
def test_a_number_whose_square_is_infinite(tmp_path, value):
    record = changed(sweep(seeds=1)[0], "results.validation_loss", value)
    (tmp_path / "large.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"large.json: results.validation_loss is larger than any measurement"):
        find_records([tmp_path])


def check(folder, wrong, field):
    write_record(folder / "good.json", sweep(seeds=1)[1])
    write_record(folder / "wrong.json", wrong)
    messages = []
    (record,) = find_records([folder], messages.append)
    assert make_sections([record])
    (message,) = messages
    assert message.startswith(f"{folder / 'wrong.json'}: {field.split('.')[0]}")
    assert field.split(".")[-1] in message
    with pytest.raises(ValueError, match=r"wrong\.json: "):
        find_records([folder])
    with pytest.raises(ValueError, match=r"no valid record: .*wrong\.json: "):
        find_records([folder / "wrong.json"], messages.append)


def test_a_damaged_file_is_left_out_by_name(tmp_path, one):
    write_record(tmp_path / "good.json", one("svd", 2.0))
    (tmp_path / "cut.json").write_text('{"kind": "comparison", "samples": ')
    messages = []
    assert len(find_records([tmp_path], messages.append)) == 1
    assert "cut.json is not JSON" in messages[0]


def test_results_that_are_only_partly_there_are_rendered(one):
    """What may be missing may be: none of these once rendered."""
    bare = {"perplexity": None, "ratio": None}
    texts = {"wikitext-2-test": bare}
    positions = [{"start": 0, "stop": 9}]
    records = [one("none", 1.0, decode=None, cache=None), one("svd", 2.0, texts=texts, positions=positions)]
    assert make_sections([*records, one("gram", 2.0, texts={}, continuations={"a": {"ratio": 2.0}})])
