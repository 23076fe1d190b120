"""Evaluate models on long contexts and keep what came out: one record a model, and every answer."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mea.evaluate.journal import Journal
from mea.evaluate.long_context.answering import Answerer
from mea.evaluate.long_context.cells import cells_of, samples_of
from mea.evaluate.long_context.paired import compare
from mea.evaluate.long_context.plan import (
    POSITION,
    WINDOWS,
    Asked,
    LongContext,
    Work,
    chosen_lengths,
    chosen_tasks,
    prompts,
)
from mea.evaluate.long_context.position import by_ranges, position_tokens
from mea.evaluate.long_context.prompts import Source
from mea.evaluate.model_info import check_model, compression_of, identity, labels_of
from mea.evaluate.perplexity import token_losses
from mea.evaluate.through_cache import reading_in
from mea.models.loading import load, load_config, load_tokenizer
from mea.records import Progress, Record, make_record, read_record, write_record

Say = Callable[[str], None]
KIND = "long context"
TRIAL = 512  # tokens that are read to tell how long everything will take


def evaluate(
    source: str,
    plan: LongContext,
    out: str | Path,
    *,
    against: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> list[Record]:
    """Evaluate a model, and another one on the same prompts if `against` is given; models are loaded in turn.

    Writes into `out`: ``<label>-long-context.json``; ``samples/<label>-long-context.jsonl`` with recipes of prompts,
    questions, answers and scores; while it runs, ``journal/`` with what is done. A record that is there is not made
    again.

    Parameters
    ----------
    progress
        Called with what is being done, and per cent of the work.
    say
        Called with a line about the cost before a model begins.

    Returns
    -------
    list of Record
        Of the kind ``"long context"``, and with `against` last one of the kind ``"paired long context"``.

    Raises
    ------
    ValueError, OSError
        Everything wrong with names, lengths, texts, configurations and tokenizers: before any weights are loaded.
    """
    labels = labels_of(source, against, label)
    names = [source, *([against] if against else [])]
    for name in names:
        check_model(name, plan.dtype)
    reading_in(plan.cache_bits)  # refuses what cannot be
    tasks = chosen_tasks(plan)
    lengths = chosen_lengths(plan.lengths, [_context(name) for name in names])
    sources = [Source(load_tokenizer(name), plan.text) for name in names]
    asked = [prompts(one, plan, tasks, lengths) for one in sources]
    marks = [_mark(plan, tasks, lengths, one, found) for one, found in zip(sources, asked, strict=True)]
    if marks[0] != marks[-1]:
        raise ValueError(f"{source} and {against} read the prompts as different tokens: they cannot be compared")
    records = []
    for place, name in enumerate(names):
        bits = plan.cache_bits if place == 0 else None
        about = identity(name, plan.dtype) | marks[place] | {"cache_bits": bits}
        path = Path(out) / f"{labels[place]}-long-context.json"
        if path.is_file() and _is_of(record := read_record(path), about):
            records.append(record)
            continue
        run = _Run(name, labels[place], Path(out), about, progress, say)
        records.append(run(sources[place], asked[place], plan))
        write_record(path, records[-1])
        run.kept.unlink(missing_ok=True)
    if against:
        records.append(compare(*records))
        write_record(Path(out) / f"paired-{labels[0]}-{labels[1]}-long-context.json", records[-1])
    return records


def _context(name: str) -> int | None:
    return getattr(load_config(name).get_text_config(), "max_position_embeddings", None)


def _mark(
    plan: LongContext, tasks: Sequence[str], lengths: Sequence[int], source: Source, asked: Sequence[Asked]
) -> dict[str, Any]:
    """What two evaluations must share to be comparable; the digest covers every prompt and every question's tokens."""
    digest = Journal.key("prompts", [(asdict(one.prompt), source.ids(one.prompt.context)) for one in asked])
    if POSITION in tasks:
        digest = Journal.key("and", [digest, position_tokens(source, plan.position_text, lengths[-1]).tolist()])
    texts = {"text": plan.text, "position_text": plan.position_text}
    return {"tasks": list(tasks), "lengths": list(lengths), "limit": plan.limit, "prompts": digest} | texts


def _is_of(record: Record, about: dict[str, Any]) -> bool:
    return record["kind"] == KIND and all(record["config"].get(key) == value for key, value in about.items())


class _Run:
    """One model's part of an evaluation."""

    def __init__(
        self, name: str, label: str, out: Path, about: dict[str, Any], progress: Progress | None, say: Say | None
    ):
        self.name, self.label, self.out, self.about = name, label, out, about
        self.kept = out / "journal" / f"{label}-long-context.jsonl"
        self.journal = Journal(self.kept, about)
        self.progress, self.say = progress, say
        self.done = self.total = 0.0

    def __call__(self, source: Source, asked: Sequence[Asked], plan: LongContext) -> Record:
        model, _ = load(self.name, plan.dtype)
        answerer, work = Answerer(model, source, self.about["cache_bits"]), Work.of(model)
        longest = self.about["lengths"][-1]
        costs = [work(one.tokens, len(one.prompt.queries)) for one in asked]
        whole = WINDOWS * work(longest) if POSITION in self.about["tasks"] else 0.0
        keys = [Journal.key(KIND, one.recipe) for one in asked]
        missing = sum(cost for key, cost in zip(keys, costs, strict=True) if key not in self.journal)
        self.total = sum(costs) + whole
        self._tell_cost(answerer, work, asked, missing + whole)
        began, kept = time.perf_counter(), len(self.journal.answers)
        for one, key, cost in zip(asked, keys, costs, strict=True):
            if key not in self.journal:
                answers, tokens, held = answerer.answer(one.prompt)
                found = {"context": tokens, "cache_bytes": held, "answers": [answer.as_dict() for answer in answers]}
                self.journal.add({key: json.dumps(found)})
            self._tell(f"{one.task} at {one.tokens:,} tokens", cost)
        results: dict[str, Any] = {}
        samples = [json.loads(self.journal[key]) for key in keys]
        results["cells"], kept_samples = cells_of(asked, samples), samples_of(asked, samples)
        if whole:
            results["positions"], kept_samples[POSITION] = self._position(model, source, plan, whole)
        results |= {"seconds": time.perf_counter() - began, "answers_kept_from_before": kept}
        self._write_samples(asked, samples)
        facts = {"model": self.name, "label": self.label, "parameters": model.num_parameters()}
        facts |= {"compression": compression_of(self.name), "suite": "long-context"}
        return make_record(
            KIND, facts | self.about, results=results, samples=kept_samples, seeds={"prompts": plan.seed}
        )

    def _position(
        self, model: Any, source: Source, plan: LongContext, cost: float
    ) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
        longest = self.about["lengths"][-1]
        tokens = position_tokens(source, plan.position_text, longest)
        losses = token_losses(
            model,
            tokens,
            longest,
            start=source.start,
            read=reading_in(self.about["cache_bits"]),
            progress=lambda _, of: self._tell("loss by position", cost / of),
        )
        return by_ranges(losses, self.about["lengths"])

    def _tell(self, what: str, cost: float) -> None:
        self.done += cost
        if self.progress:
            self.progress(f"{self.label} ({what})", math.floor(100 * self.done / self.total + 1e-9), 100)

    def _tell_cost(self, answerer: Answerer, work: Work, asked: Sequence[Asked], missing: float) -> None:
        """Say how much there is to do, and how long it will take at the speed of a short reading."""
        if self.say is None:
            return
        trial = min(TRIAL, self.about["lengths"][-1])
        seconds = answerer.seconds_of(trial)
        minutes = missing / work(trial) * seconds / 60
        tokens = sum(one.tokens for one in asked)
        self.say(
            f"{self.label}: {len(asked)} prompts of {tokens:,} tokens in all, about {max(1, round(minutes))} minutes "
            f"here (judged by reading {trial} tokens)"
        )

    def _write_samples(self, asked: Sequence[Asked], samples: Sequence[dict[str, Any]]) -> None:
        lines = []
        for one, found in zip(asked, samples, strict=True):
            for query, answer in zip(one.prompt.queries, found["answers"], strict=True):
                what = one.recipe | {"context": found["context"], "ask": query.ask, "answer_depth": query.depth}
                lines.append(json.dumps(what | {"right": query.right, "wrong": query.wrong} | answer) + "\n")
        path = self.out / "samples" / f"{self.label}-long-context.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
