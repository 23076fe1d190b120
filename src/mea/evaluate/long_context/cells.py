"""Scores by task, length and depth, with the bytes of the cache."""

import math
from collections.abc import Sequence
from typing import Any

from mea.evaluate.long_context.plan import Asked

SCORES = ("choice", "exact", "logprob")


def cells_of(asked: Sequence[Asked], samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every task, length and depth that was asked about.

    It has ``task``, ``tokens``, ``depth`` (None if the answer stands at several), ``items`` (prompts),
    ``questions``, ``chance`` (of `choice` by guessing), ``context`` and ``cache_bytes`` (means over prompts), and for
    each score its mean with a standard error over prompts: questions about one prompt are not independent.
    """
    cells: dict[tuple[str, int, float | None], list[tuple[Asked, dict[str, Any], list[int]]]] = {}
    for one, sample in zip(asked, samples, strict=True):
        depths = [query.depth for query in one.prompt.queries]
        for depth in dict.fromkeys(depths):
            questions = [i for i, other in enumerate(depths) if other == depth]
            cells.setdefault((one.task, one.tokens, depth), []).append((one, sample, questions))
    return [_cell(task, tokens, depth, parts) for (task, tokens, depth), parts in cells.items()]


def _cell(
    task: str, tokens: int, depth: float | None, parts: Sequence[tuple[Asked, dict[str, Any], list[int]]]
) -> dict[str, Any]:
    query = parts[0][0].prompt.queries[parts[0][2][0]]
    cell: dict[str, Any] = {"task": task, "tokens": tokens, "depth": depth, "items": len(parts)}
    cell["questions"] = sum(len(questions) for *_, questions in parts)
    cell["chance"] = len(query.right) / len(query.candidates)
    for name in ("context", "cache_bytes"):
        cell[name] = sum(sample[name] for _, sample, _ in parts) / len(parts)
    for score in SCORES:
        means = [sum(sample["answers"][i][score] for i in which) / len(which) for _, sample, which in parts]
        cell[score] = mean_with_error(means)
    return cell


def mean_with_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard error; of a single value no error is known."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "standard_error": None}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "standard_error": math.sqrt(variance / len(values))}


def samples_of(asked: Sequence[Asked], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Task -> length -> score -> the means of all prompts, in the order in which they were asked."""
    by_task: dict[str, Any] = {}
    for one, sample in zip(asked, samples, strict=True):
        scores = by_task.setdefault(one.task, {}).setdefault(str(one.tokens), {score: [] for score in SCORES})
        answers = sample["answers"]
        for score in SCORES:
            scores[score].append(sum(answer[score] for answer in answers) / len(answers))
    return by_task
