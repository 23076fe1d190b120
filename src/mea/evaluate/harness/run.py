"""Evaluate models on the harness's tasks and keep what came out: a record a task, and every sample with its prompt."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import evaluator

from mea.evaluate.harness.local_data import TaskData, read_task
from mea.evaluate.harness.model import PackedLM, harness_task, task_names
from mea.evaluate.journal import Journal
from mea.evaluate.model_info import check_model, compression_of, identity, labels_of
from mea.evaluate.paired import average_difference, paired_difference
from mea.evaluate.suites import SUITES, ZERO_SHOT, select
from mea.models.loading import load
from mea.records import Progress, Record, make_record, read_record, write_record

KIND, PAIRED = "task", "paired tasks"


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes
    ----------
    suite, tasks
        Name of a suite, or names of the harness's tasks, which come first.
    data
        Folder with local rows (zero-shot tasks only); None lets the harness load its data sets.
    limit
        Only so many rows of each task.
    dtype
        To compute in.
    batch_tokens
        Tokens of a batch; None finds them.
    """

    suite: str | None = None
    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    dtype: str = "auto"
    batch_tokens: int | None = None


def evaluate(
    source: str,
    plan: Evaluation,
    out: str | Path,
    *,
    against: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Evaluate a model, and another one on the same items if `against` is given; models are loaded one after the other.

    Writes into `out`: ``<label>-<task>.json``, a record a task; ``samples/<label>-<task>.jsonl`` with prompts, answers
    and scores; while a task runs, ``journal/`` with what is done. Tasks whose record is there are not run again.

    Returns
    -------
    list of Record
        Of the kind ``"task"``, and with `against` last one of the kind ``"paired tasks"``.

    Raises
    ------
    ValueError, OSError
        Everything wrong with names, data, models' configurations and tokenizers: before any weights are loaded.
    """
    labels = labels_of(source, against, label)
    names, data = prepare(plan)
    sources = [source, *([against] if against else [])]
    for name in sources:
        check_model(name, plan.dtype)
    found = [
        _evaluate_one(name, mark, plan, names, data, Path(out), progress)
        for name, mark in zip(sources, labels, strict=True)
    ]
    records = [record for one in found for record in one]
    if against:
        paired = compare(*found)
        write_record(Path(out) / f"paired-{labels[0]}-{labels[1]}.json", paired)
        records.append(paired)
    return records


def prepare(plan: Evaluation) -> tuple[tuple[str, ...], dict[str, TaskData | None]]:
    """Task names and their local rows, checked.

    Raises
    ------
    ValueError, OSError
        An unknown name, a missing or malformed file, a limit that is not positive.
    """
    if plan.limit is not None and plan.limit < 1:
        raise ValueError(f"the number of rows must be positive, not {plan.limit}")
    known = ZERO_SHOT if plan.suite == "zero-shot" and not plan.tasks else task_names()
    names = select(plan.suite, plan.tasks, known)
    if plan.data is None:
        return names, dict.fromkeys(names)
    return names, {name: read_task(plan.data, name, plan.limit) for name in names}


def compare(first: Sequence[Record], second: Sequence[Record]) -> Record:
    """Compare two models' records of the same tasks, item by item.

    Raises
    ------
    ValueError
        The records are not of the same items.
    """
    pairs = {record["config"]["task"]: record for record in second}
    results, scores = {}, ({}, {})
    for record in first:
        task = record["config"]["task"]
        other = pairs.get(task)
        if other is None or any(record["config"][key] != other["config"][key] for key in ("data", "limit", "rows")):
            raise ValueError(f"the two models were not evaluated on the same rows of {task}")
        metrics = {}
        for metric in record["results"]["metrics"]:
            mine, theirs = (numbers(one["samples"][metric]) for one in (record, other))
            metrics[metric] = paired_difference(mine, theirs).as_dict()
        results[task] = metrics
        main = record["results"]["main"]
        scores[0][task], scores[1][task] = (numbers(one["samples"][main]) for one in (record, other))
    labels = [records[0]["config"]["label"] for records in (first, second)]
    config = {"first": labels[0], "second": labels[1], "limit": first[0]["config"]["limit"]}
    config["dtype"] = [", ".join(sorted({one["config"]["dtype"] for one in records})) for records in (first, second)]
    average = average_difference(*scores)
    return make_record(PAIRED, config, results={"tasks": results, "average": average}, seeds={"bootstrap": 0})


def numbers(sample: str | Sequence[float]) -> list[float]:
    """Scores of all items: scores of 0 and 1 are kept as a text of digits, so that records stay small."""
    return [float(x) for x in sample]


def _evaluate_one(
    source: str,
    label: str,
    plan: Evaluation,
    names: Sequence[str],
    data: dict[str, TaskData | None],
    out: Path,
    progress: Progress | None,
) -> list[Record]:
    about = identity(source, plan.dtype) | {"limit": plan.limit}
    lm: Any = None
    records = []
    for name in names:
        rows = data[name]
        mark = about | {"task": name, "data": rows.digest if rows else None}
        path = out / f"{label}-{name}.json"
        if path.is_file() and _is_of(record := read_record(path), mark):
            records.append(record)
            continue
        if lm is None:
            model, tokenizer = load(source, plan.dtype)
            lm = PackedLM(model, tokenizer, batch_tokens=plan.batch_tokens)
        journal = Path(out, "journal", f"{label}-{name}.jsonl")
        lm.journal = Journal(journal, mark)
        kept = len(lm.journal.answers)
        lm.progress = None if progress is None else (lambda done, all_, name=name: progress(name, done, all_))
        began = time.perf_counter()
        tasks = harness_task(name, rows)
        found: Any = evaluator.evaluate(lm, {"tasks": tasks}, limit=plan.limit, bootstrap_iters=0)
        seconds = time.perf_counter() - began
        facts = {"model": source, "label": label, "suite": plan.suite, "parameters": lm.model.num_parameters()}
        facts |= {"compression": compression_of(source), "batch_tokens": plan.batch_tokens}
        details = {"seconds": seconds, "answers_kept_from_before": kept, "tokens_per_batch": lm.scorer.size.tokens}
        record = _record(name, found, facts | mark, details)
        _write_samples(out / "samples" / f"{label}-{name}.jsonl", found)
        write_record(path, record)
        journal.unlink(missing_ok=True)
        records.append(record)
    return records


def _is_of(record: Record, mark: dict[str, Any]) -> bool:
    return record["kind"] == KIND and all(record["config"].get(key) == value for key, value in mark.items())


def _record(name: str, found: Any, config: dict[str, Any], details: dict[str, Any]) -> Record:
    """One record for all subtasks of a name: their items one after the other."""
    samples = [sample for task in sorted(found["samples"]) for sample in found["samples"][task]]
    metrics = [m for m in samples[0]["metrics"] if isinstance(samples[0][m], int | float)]
    results: dict[str, Any] = {"items": len(samples), "metrics": {}, "main": "acc" if "acc" in metrics else metrics[0]}
    kept: dict[str, Any] = {}
    for metric in metrics:
        values = [float(sample[metric]) for sample in samples]
        mean = sum(values) / len(values)
        variance = sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)
        results["metrics"][metric] = {"mean": mean, "standard_error": math.sqrt(variance / len(values))}
        kept[metric] = "".join(f"{x:.0f}" for x in values) if set(values) <= {0.0, 1.0} else values
    if isinstance(samples[0]["filtered_resps"], list) and len(samples[0]["filtered_resps"]) > 1:
        kept["answer"] = "".join(str(_likeliest(sample)) for sample in samples)
    rows = "".join(sample["doc_hash"] for sample in samples)
    config |= {"rows": Journal.key("rows", rows), "harness": found.get("versions", {}).get(name)}
    return make_record(KIND, config, results=results | details, samples=kept)


def _likeliest(sample: dict[str, Any]) -> int:
    values = [float(answer[0]) for answer in sample["filtered_resps"]]
    return values.index(max(values))


def _write_samples(path: Path, found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        for task, samples in found["samples"].items():
            for sample in samples:
                line = {"task": task, "item": sample["doc_id"], "asked": sample["arguments"]}
                line |= {"answered": sample["filtered_resps"], "target": sample["target"]}
                line |= {metric: sample[metric] for metric in sample["metrics"]}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    os.replace(temporary, path)


def describe(suite: str) -> str:
    """What a suite measures of the paper's tables, and what it cannot."""
    found = SUITES[suite]
    reached = ", ".join(f"{column} ({task})" for column, task in found.columns.items()) or "none"
    missing = f"; without a task: {', '.join(found.missing)}" if found.missing else ""
    return f"{found.what}. The paper's columns: {reached}{missing}"
