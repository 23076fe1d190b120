"""Tasks of lm-evaluation-harness as a suite: a record for each task, and the comparison of two models' records."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lm_eval import evaluator

from mea.evaluate.harness.local_data import TaskData, read_task
from mea.evaluate.harness.model import PackedLM, harness_task, task_names
from mea.evaluate.journal import Journal
from mea.evaluate.model_info import ModelInfo
from mea.evaluate.paired import average_difference, paired_difference
from mea.evaluate.runner import Job, Outcome, Session, Suite
from mea.evaluate.suites import SUITES, ZERO_SHOT, select
from mea.records import Record, make_record

PAIRED = "paired tasks"
SAME = ("data", "limit", "rows")  # what two records of one task must share to be compared


@dataclass(frozen=True)
class HarnessTasks(Suite):
    """What to evaluate, for `mea.evaluate.runner.evaluate`; records are of the kind ``"task"``.

    Attributes
    ----------
    suite, tasks
        Name of a suite, or names of the harness's tasks, which replace the suite.
    data
        Folder with local rows (zero-shot tasks only); None lets the harness load its data sets.
    limit
        Most rows of each task.
    dtype
        Of the computation.
    batch_tokens
        Tokens of a batch; None finds them.
    """

    suite: str | None = None
    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    dtype: str = "auto"
    batch_tokens: int | None = None
    kind: ClassVar[str] = "task"

    def jobs(self, models: Sequence[ModelInfo]) -> list[list[Job]]:
        """One job for each task, the same for every model.

        Raises
        ------
        ValueError, OSError
            An unknown name, a missing or malformed file, a limit that is not positive.
        """
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"the number of rows must be positive, not {self.limit}")
        known = ZERO_SHOT if self.suite == "zero-shot" and not self.tasks else task_names()
        names = select(self.suite, self.tasks, known)
        jobs = []
        for name in names:
            rows = None if self.data is None else read_task(self.data, name, self.limit)
            fingerprint = {"limit": self.limit, "task": name, "data": rows.digest if rows else None}
            jobs.append(Job(name, fingerprint, partial(self._run, name, rows)))
        return [jobs] * len(models)

    def open(self, model: Any, tokenizer: Any) -> PackedLM:
        return PackedLM(model, tokenizer, batch_tokens=self.batch_tokens)

    def compare(self, first: Sequence[Record], second: Sequence[Record]) -> Record:
        return compare(first, second)

    def _run(self, name: str, rows: TaskData | None, session: Session) -> Outcome:
        lm, tasks = session.model, harness_task(name, rows)
        lm.begin(name, session.journal, session.progress)
        evaluated: Any = evaluator.evaluate(lm, {"tasks": tasks}, limit=self.limit, bootstrap_iters=0)
        by_task = evaluated["samples"]
        items = [item for task in sorted(by_task) for item in by_task[task]]  # of all subtasks, one after the other
        results, samples = _scores(items)
        digest = Journal.key("rows", "".join(item["doc_hash"] for item in items))
        config = {"suite": self.suite, "batch_tokens": self.batch_tokens, "rows": digest}
        config["harness"] = evaluated.get("versions", {}).get(name)
        return Outcome(results | {"tokens_per_batch": lm.scorer.size.tokens}, samples, list(_lines(by_task)), config)


def compare(first: Sequence[Record], second: Sequence[Record]) -> Record:
    """Compare two models' records of the same tasks, item by item; a record of the kind ``"paired tasks"``.

    Raises
    ------
    ValueError
        The records are not of the same items.
    """
    others = {record["config"]["task"]: record for record in second}
    results, scores = {}, ({}, {})
    for record in first:
        task, main = record["config"]["task"], record["results"]["main"]
        other = others.get(task)
        if other is None or any(record["config"][key] != other["config"][key] for key in SAME):
            raise ValueError(f"the two models were not evaluated on the same rows of {task}")
        samples = record["samples"], other["samples"]
        results[task] = {
            metric: paired_difference(*(numbers(sample[metric]) for sample in samples)).as_dict()
            for metric in record["results"]["metrics"]
        }
        for side, sample in zip(scores, samples, strict=True):
            side[task] = numbers(sample[main])
    labels = [records[0]["config"]["label"] for records in (first, second)]
    config = {"first": labels[0], "second": labels[1], "limit": first[0]["config"]["limit"]}
    config["dtype"] = [", ".join(sorted({one["config"]["dtype"] for one in records})) for records in (first, second)]
    average = average_difference(*scores)
    return make_record(PAIRED, config, results={"tasks": results, "average": average}, seeds={"bootstrap": 0})


def numbers(sample: str | Sequence[float]) -> list[float]:
    """Scores of all items: scores of 0 and 1 are kept as a text of digits, so that records stay small."""
    return [float(x) for x in sample]


def _scores(items: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each metric's mean with its standard error; and the scores of all items."""
    metrics = [metric for metric in items[0]["metrics"] if isinstance(items[0][metric], int | float)]
    results: dict[str, Any] = {"items": len(items), "metrics": {}, "main": "acc" if "acc" in metrics else metrics[0]}
    samples: dict[str, Any] = {}
    for metric in metrics:
        values = [float(item[metric]) for item in items]
        mean = sum(values) / len(values)
        variance = sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)
        results["metrics"][metric] = {"mean": mean, "standard_error": math.sqrt(variance / len(values))}
        samples[metric] = "".join(f"{x:.0f}" for x in values) if set(values) <= {0.0, 1.0} else values
    if isinstance(items[0]["filtered_resps"], list) and len(items[0]["filtered_resps"]) > 1:
        samples["answer"] = "".join(str(_likeliest(item)) for item in items)
    return results, samples


def _likeliest(item: dict[str, Any]) -> int:
    values = [float(answer[0]) for answer in item["filtered_resps"]]
    return values.index(max(values))


def _lines(by_task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task, items in by_task.items():
        for item in items:
            line = {"task": task, "item": item["doc_id"], "asked": item["arguments"]}
            line |= {"answered": item["filtered_resps"], "target": item["target"]}
            yield line | {metric: item[metric] for metric in item["metrics"]}


def describe(name: str) -> str:
    """The columns of the paper's tables that a suite measures, and those that it lacks."""
    suite = SUITES[name]
    reached = ", ".join(f"{column} ({task})" for column, task in suite.columns.items()) or "none"
    missing = f"; without a task: {', '.join(suite.missing)}" if suite.missing else ""
    return f"{suite.what}. The paper's columns: {reached}{missing}"
