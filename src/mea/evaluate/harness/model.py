"""Access to lm-evaluation-harness: its tasks over local rows, and its model interface with this package's scorer."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.model import CacheHook
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mea.evaluate.harness.local_data import TaskData
from mea.evaluate.harness.packing import Scored
from mea.evaluate.harness.scoring import Scorer
from mea.evaluate.journal import Journal
from mea.records import Progress

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@cache
def task_manager() -> TaskManager:
    """The harness's index of its own tasks and of those in ``tasks/``; creating it takes seconds."""
    return TaskManager(include_path=str(Path(__file__).parent / "tasks"))


def harness_task(name: str, data: TaskData | None = None) -> Any:
    """A task of the harness, unchanged except that its rows come from `data` if given."""
    manager: Any = task_manager()
    if data is None:
        return manager.load(name)["tasks"]
    splits = {f"{split}_split": split if split == data.split else None for split in ("training", "validation", "test")}
    rows = {data.split: Dataset.from_list(list(data.rows))}
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    for key in ("tag", "group", "task_list"):  # where the task is listed: no part of it
        config.pop(key, None)
    return {name: ConfigurableTask(config=config | {"custom_dataset": lambda **_: rows} | splits)}


def task_names() -> list[str]:
    """Every task, group and tag that the harness knows."""
    return list(task_manager().all_tasks)


_HFLM: Any = HFLM  # the harness registers it by a decorator that hides its type


class PackedLM(_HFLM):
    """The harness's interface to a model in memory; log-likelihoods by `Scorer`, every answer kept in a journal.

    Tokens, prompts, the treatment of texts that are too long and generation are the harness's own.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int | None = None, batch_size: int = 1):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.scorer = Scorer(model, batch_tokens)
        self.begin("", Journal())

    def begin(self, task: str, journal: Journal, progress: Progress | None = None) -> None:
        """Answer one task from now on; `progress` counts tokens of scored texts, or generated answers."""
        self.task, self.journal, self.progress = task, journal, progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._through_journal("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._through_journal("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        self.set_cache_hook(_Hook(self, len(requests)))
        return self._through_journal("generate_until", requests, super().generate_until)

    def _through_journal(self, kind: str, requests: list[Any], answer: Callable[..., list[Any]]) -> list[Any]:
        keys = [Journal.key(kind, request.args) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.journal}
        if missing:
            answers = answer(list(missing.values()), disable_tqdm=True)
            answered = zip(missing, answers, strict=True)
            self.journal.add({key: answer for key, answer in answered if key not in self.journal})
        return [self.journal[key] for key in keys]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            texts.append(Scored(tuple(tokens[:-1]), tuple(continuation[-len(tokens) + 1 :])))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        for results, done, total in self.scorer.score(texts):
            for index, value, greedy in results:
                answers[index] = (value, greedy)
            keyed = {Journal.key("loglikelihood", requests[i][0]): answers[i] for i, *_ in results if requests[i][0]}
            self.journal.add(keyed)
            if self.progress:
                self.progress(self.task, done, total)
        return answers


class _Hook(CacheHook):
    """Keeps each generated answer as soon as it is there."""

    def __init__(self, lm: PackedLM, total: int):
        super().__init__(None)
        self.lm, self.total = lm, total

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.lm.journal.add({Journal.key(attr, req): res})
        if self.lm.progress:
            self.lm.progress(self.lm.task, len(self.lm.journal.answers), self.total)
