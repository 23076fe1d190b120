"""Local rows against the harness's own tasks and its own model class; what is wrong with a file, and in which row."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from mea.evaluate.harness.local_data import read_task
from mea.evaluate.harness.model import PackedLM, harness_task, task_manager, task_names
from mea.evaluate.suites import SUITES, ZERO_SHOT, select

DATA = Path(__file__).parents[1] / "data"


def published(task: str) -> dict[str, Dataset]:
    """The rows as the data set on the hub has them: what the harness's task would download."""
    path = next((DATA / task).glob("*.jsonl"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    name = "question_stem" if task == "openbookqa" else "question"
    if "query" in rows[0]:
        rows = [
            {
                name: row["query"][len("Question: ") : -len("\nAnswer:")],
                "choices": {"text": row["choices"], "label": list("ABCDE"[: len(row["choices"])])},
                "answerKey": "ABCDE"[row["gold"]],
            }
            for row in rows
        ]
    split = "test" if path.name.startswith("test") else "validation"
    return {split: Dataset.from_list(rows), "train": Dataset.from_list(rows)}


@pytest.mark.parametrize("task", ZERO_SHOT)
def test_scores_are_those_of_the_harness_item_by_item(tiny, bytes_tokenizer, monkeypatch, task):
    """The harness's task as it stands, its data set replaced at the door; its own model class."""
    model = tiny("Llama", vocab_size=258, max_position_embeddings=1024)
    ours = evaluator.evaluate(
        PackedLM(model, bytes_tokenizer, batch_tokens=2048),
        {"tasks": harness_task(task, read_task(DATA, task, 8))},
        bootstrap_iters=0,
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: published(task))
    reference = evaluator.evaluate(
        HFLM(pretrained=model, tokenizer=bytes_tokenizer, batch_size=4),
        {"tasks": task_manager().load(task)["tasks"]},
        limit=8,
        bootstrap_iters=0,
    )
    assert len(ours["samples"][task]) == 8
    for mine, theirs in zip(ours["samples"][task], reference["samples"][task], strict=True):
        assert mine["arguments"] == theirs["arguments"]
        assert mine["target"] == theirs["target"]
        values, expected = ([one[0][0] for one in sample["resps"]] for sample in (mine, theirs))
        assert values == pytest.approx(expected, rel=1e-4)
        assert {name: mine[name] for name in mine["metrics"]} == {name: theirs[name] for name in theirs["metrics"]}
    assert ours["results"][task]["acc,none"] == reference["results"][task]["acc,none"]


@pytest.mark.parametrize("task", ZERO_SHOT)
def test_all_rows_are_read(task):
    data = read_task(DATA, task)
    assert len(data.rows) == 50
    assert read_task(DATA, task, 3).rows == data.rows[:3]


def changed(tmp_path: Path, task: str, change) -> Path:
    source = next((DATA / task).glob("*.jsonl"))
    lines = source.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[6])
    change(row)
    lines[6] = json.dumps(row)
    (tmp_path / task).mkdir()
    (tmp_path / task / f"{source.name}.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", lambda row: row.pop("sol2"), r"row 7: the field 'sol2' is missing; expected goal, sol1"),
        ("piqa", lambda row: row.update(label=2), r"row 7: label is 2, not one of 0, 1"),
        ("winogrande", lambda row: row.update(sentence="none"), r"row 7: the sentence has no '_' to fill"),
        ("hellaswag", lambda row: row.update(label="4"), r"row 7: label is '4', not one of 0, 1, 2, 3"),
        ("arc_easy", lambda row: row.update(gold=9), r"row 7: gold is 9, but there are \d choices"),
        ("openbookqa", lambda row: row.update(query="What?"), r"row 7: the query does not have the form"),
        ("arc_challenge", lambda row: row.update(choices="ab"), r"row 7: .*(choices|gold)"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, task, change, message):
    with pytest.raises(ValueError, match=message):
        read_task(changed(tmp_path, task, change), task)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder at"):
        read_task(tmp_path / "gone", "piqa")
    with pytest.raises(FileNotFoundError, match=r"piqa holds none of test\.jsonl\.gz"):
        read_task(tmp_path, "piqa")
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.jsonl").write_text('{"goal": \n')
    with pytest.raises(ValueError, match="row 1: not JSON"):
        read_task(tmp_path, "piqa")
    (tmp_path / "piqa" / "test.jsonl.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(ValueError, match="not a complete gzip file"):
        read_task(tmp_path, "piqa")


def test_suites_name_tasks_that_the_harness_has():
    known = task_names()
    for suite in SUITES.values():
        assert select(suite.name, (), known) == suite.tasks
        assert set(suite.columns.values()) <= set(suite.tasks)
        assert not set(suite.columns) & set(suite.missing)


@pytest.mark.parametrize(
    ("suite", "tasks", "message"),
    [
        ("zero-shit", (), "did you mean 'zero-shot'"),
        (None, ("hellaswg",), "did you mean 'hellaswag'"),
        (None, (), "nothing to evaluate"),
        (None, ("piqa", "piqa"), "named twice"),
    ],
)
def test_unknown_names(suite, tasks, message):
    with pytest.raises(ValueError, match=message):
        select(suite, tasks)
