"""Runs evaluations: loads models, stores answers, resumes, and writes records.

A `Suite` (`mea.evaluate.harness.run.HarnessTasks`, `mea.evaluate.long_context.LongContext`) consists of jobs. Each job
becomes one record of one model.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mea.evaluate.journal import Journal
from mea.evaluate.model_info import ModelInfo, label_models
from mea.models.loading import load
from mea.records import Progress, Record, make_record, read_record, write_atomically, write_record

Say = Callable[[str], None]


class Session(NamedTuple):
    """Inputs of a job: the opened model, the existing answers, and functions to report to."""

    model: Any
    journal: Journal
    progress: Progress
    say: Say


@dataclass(frozen=True)
class Outcome:
    """Results of a job: parts of its record, and one line for each item with its prompt and answer."""

    results: dict[str, Any]
    samples: dict[str, Any]
    lines: Sequence[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """The part of a suite that becomes one record of one model.

    Attributes
    ----------
    name
        Name in file names, after the model's label.
    fingerprint
        Everything that the answers depend on besides the weights and the dtype.
    run
        Does the job.
    """

    name: str
    fingerprint: dict[str, Any]
    run: Callable[[Session], Outcome]


class Suite(ABC):
    """A set of jobs on which models are evaluated.

    Attributes
    ----------
    kind
        Kind of the records.
    paired_suffix
        End of the file name of the paired comparison.
    dtype
        Dtype of the computation.
    """

    kind: ClassVar[str]
    paired_suffix: ClassVar[str] = ""
    dtype: str

    @abstractmethod
    def jobs(self, models: Sequence[ModelInfo]) -> list[list[Job]]:
        """The jobs of each model; raises ValueError or OSError for every mistake, without loading weights."""

    @abstractmethod
    def compare(self, first: Sequence[Record], second: Sequence[Record]) -> Record:
        """The paired comparison of two models' records."""

    def open(self, model: Any, tokenizer: Any) -> Any:
        """The value of `Session.model`; by default the model itself."""
        return model


def evaluate(
    source: str,
    suite: Suite,
    out: str | Path,
    *,
    against: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> list[Record]:
    """Evaluate a model, and another one on the same items if `against` is given; models are loaded one after the other.

    Writes into `out`: ``<label>-<job>.json``, a record of each job; ``samples/<label>-<job>.jsonl`` with prompts,
    answers and scores; while a job runs, ``journal/`` with the answers so far. A job whose record exists is not run
    again.

    Parameters
    ----------
    progress
        Called with the stage's name, the steps done and all steps.
    say
        Called with a line about the cost before a long job begins.

    Returns
    -------
    list of Record
        Records of the suite's kind; with `against`, the paired comparison comes last.

    Raises
    ------
    ValueError, OSError
        A name, data set, configuration or tokenizer is unsuitable; raised before any weights are loaded.
    """
    models = label_models(source, against, label)
    for model in models:
        model.check(suite.dtype)
    run = _Run(suite, Path(out), progress or (lambda *_: None), say or (lambda _: None))
    by_model = [run(model, jobs) for model, jobs in zip(models, suite.jobs(models), strict=True)]
    records = [record for of_model in by_model for record in of_model]
    if against:
        records.append(suite.compare(*by_model))
        name = f"paired-{models[0].label}-{models[1].label}{suite.paired_suffix}.json"
        write_record(Path(out) / name, records[-1])
    return records


class _Run(NamedTuple):
    suite: Suite
    out: Path
    progress: Progress
    say: Say

    def __call__(self, model: ModelInfo, jobs: Sequence[Job]) -> list[Record]:
        """The records of one model, which is loaded at the first job whose record does not exist."""
        identity, opened, facts, records = model.identity(self.suite.dtype), None, {}, []
        for job in jobs:
            name, fingerprint = f"{model.label}-{job.name}", identity | job.fingerprint
            record = existing_record(self.out / f"{name}.json", self.suite.kind, fingerprint)
            if record is None:
                if opened is None:
                    loaded, tokenizer = load(model.source, self.suite.dtype, progress=self.progress)
                    opened = self.suite.open(loaded, tokenizer)
                    facts = {"model": model.source, "label": model.label, "compression": model.compression}
                    facts["parameters"] = loaded.num_parameters()
                record = self._do(name, job, opened, facts, fingerprint)
            records.append(record)
        return records

    def _do(self, name: str, job: Job, opened: Any, facts: dict[str, Any], fingerprint: dict[str, Any]) -> Record:
        path = self.out / "journal" / f"{name}.jsonl"
        journal = Journal(path, fingerprint)
        kept, began = len(journal.answers), time.perf_counter()
        outcome = job.run(Session(opened, journal, self.progress, self.say))
        timing = {"seconds": time.perf_counter() - began, "answers_kept_from_before": kept}
        config, results = facts | outcome.config | fingerprint, outcome.results | timing
        record = make_record(self.suite.kind, config, results=results, samples=outcome.samples, seeds=outcome.seeds)
        samples = self.out / "samples" / f"{name}.jsonl"
        samples.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in outcome.lines]
        write_atomically(samples, "".join(lines))
        write_record(self.out / f"{name}.json", record)
        path.unlink(missing_ok=True)
        return record


def existing_record(path: Path, kind: str, settings: dict[str, Any]) -> Record | None:
    """The record at `path` if there is one of that kind whose configuration has these settings."""
    if not path.is_file():
        return None
    record = read_record(path)
    wanted = make_record(kind, settings)["config"]  # as a record holds them
    same = all(record["config"].get(name) == value for name, value in wanted.items())
    return record if same and record["kind"] == kind else None
