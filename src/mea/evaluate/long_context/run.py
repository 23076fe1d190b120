"""Long contexts as a suite: one record of a model, and every answer."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from mea.evaluate.journal import Journal
from mea.evaluate.long_context.answering import Answerer
from mea.evaluate.long_context.cells import cells_of, samples_of
from mea.evaluate.long_context.paired import compare
from mea.evaluate.long_context.plan import POSITION, TASKS, WINDOWS, Asked, Work, chosen_lengths, prompts
from mea.evaluate.long_context.position import by_ranges, position_tokens
from mea.evaluate.long_context.prompts import Source
from mea.evaluate.model_info import ModelInfo
from mea.evaluate.perplexity import token_losses
from mea.evaluate.runner import Job, Outcome, Session, Suite
from mea.evaluate.suites import LONG_CONTEXT, select
from mea.evaluate.through_cache import check_cache_bits, reading_in
from mea.models.loading import load_tokenizer
from mea.records import Record

KIND = "long context"
TRIAL = 512  # tokens that are read to tell how long everything will take


@dataclass(frozen=True)
class LongContext(Suite):
    """The long-context suite for `mea.evaluate.runner.evaluate`; records are of the kind ``"long context"``.

    Attributes
    ----------
    tasks
        Tasks of the suite ``long-context``; all if empty.
    lengths
        In tokens, question and answer included; by default those of `LENGTHS` that the model supports.
    limit
        Prompts of each kind at each length (for the needle at each depth); by default fewer at longer lengths.
    seed
        Seed of the prompts.
    text
        Text that needles are hidden in: a packaged text or a file. The loss by position uses `position_text`.
    cache_bits
        Store the first model's cache in 8, 4, 3 or 2 bits.
    """

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    limit: int | None = None
    seed: int = 0
    text: str = "wikitext-2-valid"
    position_text: str = "wikitext-2-test"
    cache_bits: int | None = None
    dtype: str = "auto"
    kind: ClassVar[str] = KIND
    paired_suffix: ClassVar[str] = "-long-context"

    def jobs(self, models: Sequence[ModelInfo]) -> list[list[Job]]:
        """One job for each model, with the same prompts.

        Raises
        ------
        ValueError, OSError
            A name, a length or a text is wrong, the model cannot have such a cache, or the models read the prompts as
            different tokens.
        """
        check_cache_bits(models[0].source, self.cache_bits)
        tasks = select(LONG_CONTEXT, self.tasks, TASKS)
        lengths = chosen_lengths(self.lengths, [model.context for model in models])
        jobs, shared = [], []
        for model in models:
            source = Source(load_tokenizer(model.source), self.text)
            asked = prompts(source, tasks, lengths, self.limit, self.seed)
            text = position_tokens(source, self.position_text, lengths[-1]) if POSITION in tasks else None
            shared.append({"tasks": list(tasks), "lengths": list(lengths), "limit": self.limit})
            shared[-1] |= {"prompts": _digest(source, asked, text)}
            shared[-1] |= {"text": self.text, "position_text": self.position_text}
            fingerprint = shared[-1] | {"cache_bits": None if jobs else self.cache_bits}
            run = _Run(model.label, source, asked, text, self.seed, lengths, fingerprint["cache_bits"])
            jobs.append([Job(LONG_CONTEXT, fingerprint, run)])
        if shared[0] != shared[-1]:
            names = " and ".join(model.source for model in models)
            raise ValueError(f"{names} read the prompts as different tokens: they cannot be compared")
        return jobs

    def compare(self, first: Sequence[Record], second: Sequence[Record]) -> Record:
        return compare(*first, *second)


def _digest(source: Source, asked: Sequence[Asked], text: Tensor | None) -> str:
    """Of every prompt and of all tokens."""
    digest = Journal.key("prompts", [(asdict(one.prompt), source.ids(one.prompt.context)) for one in asked])
    return digest if text is None else Journal.key("and", [digest, text.tolist()])


@dataclass
class _Run:
    """One model's part: reads all prompts, then the text for the loss by position."""

    label: str
    source: Source
    asked: Sequence[Asked]
    text: Tensor | None
    seed: int
    lengths: Sequence[int]
    cache_bits: int | None

    def __call__(self, session: Session) -> Outcome:
        model, journal = session.model, session.journal
        answerer, work = Answerer(model, self.source, self.cache_bits), Work.of(model)
        costs = [work(one.tokens, len(one.prompt.queries)) for one in self.asked]
        position_cost = 0.0 if self.text is None else WINDOWS * work(self.lengths[-1])
        keys = [Journal.key(KIND, one.recipe) for one in self.asked]
        missing = sum(cost for key, cost in zip(keys, costs, strict=True) if key not in journal)
        self._say_cost(session, answerer, work, missing + position_cost)
        self.done, self.total = 0.0, sum(costs) + position_cost
        for one, key, cost in zip(self.asked, keys, costs, strict=True):
            if key not in journal:
                answers, tokens, held = answerer.answer(one.prompt)
                answered = {"context": tokens, "cache_bytes": held, "answers": [answer.as_dict() for answer in answers]}
                journal.add({key: json.dumps(answered)})
            self._tell(session, f"{one.task} at {one.tokens:,} tokens", cost)
        samples = [json.loads(journal[key]) for key in keys]
        results: dict[str, Any] = {"cells": cells_of(self.asked, samples)}
        scores = samples_of(self.asked, samples)
        if self.text is not None:
            results["positions"], scores[POSITION] = self._position(session, self.text, position_cost)
        return Outcome(results, scores, self._lines(samples), {"suite": LONG_CONTEXT}, {"prompts": self.seed})

    def _position(
        self, session: Session, text: Tensor, cost: float
    ) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
        losses = token_losses(
            session.model,
            text,
            self.lengths[-1],
            start=self.source.start,
            read=reading_in(self.cache_bits),
            what="loss by position",
            progress=lambda what, _, windows: self._tell(session, what, cost / windows),
        )
        return by_ranges(losses, self.lengths)

    def _tell(self, session: Session, what: str, cost: float) -> None:
        """Report progress in per cent of the operations: long prompts take most of the time."""
        self.done += cost
        session.progress(f"{self.label} ({what})", math.floor(100 * self.done / self.total + 1e-9), 100)

    def _say_cost(self, session: Session, answerer: Answerer, work: Work, missing: float) -> None:
        """Say how much there is to do, and how long it will take at the speed of a short reading."""
        trial = min(TRIAL, self.lengths[-1])
        minutes = missing / work(trial) * answerer.seconds_of(trial) / 60
        tokens = sum(one.tokens for one in self.asked)
        session.say(
            f"{self.label}: {len(self.asked)} prompts of {tokens:,} tokens in all, about {max(1, round(minutes))} "
            f"minutes here (judged by reading {trial} tokens)"
        )

    def _lines(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A line for each question with its recipe, its answers and its scores."""
        lines = []
        for one, sample in zip(self.asked, samples, strict=True):
            for query, answer in zip(one.prompt.queries, sample["answers"], strict=True):
                line = one.recipe | {"context": sample["context"], "ask": query.ask, "answer_depth": query.depth}
                lines.append(line | {"right": query.right, "wrong": query.wrong} | answer)
        return lines
