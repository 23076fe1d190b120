"""Two models on the same items: their difference, its uncertainty, and the number of items needed to detect it.

Items that both models get right, or both wrong, say nothing about the difference. Pairing by item removes their
variance, which makes up most of the two models' own standard errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

LEVEL = 0.95  # of intervals
POWER = 0.8  # the chance with which a difference is to show
POINT = 0.01
DRAWS = 10_000
Scores = Sequence[float | int] | np.ndarray


@dataclass(frozen=True)
class Difference:
    """Mean of ``first - second`` over items, with what is needed to judge it.

    Attributes
    ----------
    interval
        Bootstrap over items, 95 %, percentiles.
    p_value
        McNemar's exact test (of no difference); None unless every score is 0 or 1.
    only_first, only_second
        Items that only one of the two got right; None unless every score is 0 or 1.
    items_for_a_point
        Items at which a true difference of 0.01 would be found at 5 % significance in 80 % of evaluations.
    """

    items: int
    first: float
    second: float
    difference: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float | None
    only_first: int | None
    only_second: int | None
    items_for_a_point: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(first: Scores, second: Scores, *, seed: int = 0) -> Difference:
    """Compare the scores of two models on the same items, in the same order.

    Raises
    ------
    ValueError
        Fewer than two items, or different numbers of them.
    """
    a, b = (np.asarray(x, dtype=float) for x in (first, second))
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"paired scores of {a.size} and {b.size} items: both need the same two or more")
    gaps = a - b
    spread = float(gaps.std(ddof=1))
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    test = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    means = bootstrap_means(gaps, seed=seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(
        items=len(a),
        first=float(a.mean()),
        second=float(b.mean()),
        difference=float(gaps.mean()),
        standard_error=spread / math.sqrt(len(a)),
        interval=(float(low), float(high)),
        p_value=float(test) if binary else None,
        only_first=wins if binary else None,
        only_second=losses if binary else None,
        items_for_a_point=items_needed(spread),
    )


def items_needed(spread: float, difference: float = POINT) -> int:
    """Items at which a difference shows, if single items' differences scatter by `spread` (standard deviation)."""
    z = norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER)
    return math.ceil((z * spread / difference) ** 2)


def bootstrap_means(values: np.ndarray, draws: int = DRAWS, *, seed: int = 0) -> np.ndarray:
    """Means of `draws` samples of the items with replacement.

    How often each distinct value is drawn is multinomial, so that scores of few values cost next to nothing.
    """
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 64:
        return generator.multinomial(len(values), counts / len(values), size=draws) @ distinct / len(values)
    return np.array([values[generator.integers(len(values), size=len(values))].mean() for _ in range(draws)])


def average_difference(first: Mapping[str, Scores], second: Mapping[str, Scores], *, seed: int = 0) -> dict[str, Any]:
    """Difference of the unweighted average over tasks, as the paper's tables average, with tasks taken as fixed.

    Raises
    ------
    ValueError
        The models were not scored on the same tasks and items.
    """
    if set(first) != set(second) or not first:
        raise ValueError(f"tasks differ: {', '.join(sorted(first))} and {', '.join(sorted(second))}")
    parts = {task: paired_difference(first[task], second[task], seed=seed) for task in first}
    draws = [
        bootstrap_means(np.asarray(first[task], float) - np.asarray(second[task], float), seed=seed + i)
        for i, task in enumerate(parts)
    ]
    low, high = np.quantile(np.mean(draws, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "tasks": len(parts),
        "first": float(np.mean([part.first for part in parts.values()])),
        "second": float(np.mean([part.second for part in parts.values()])),
        "difference": float(np.mean([part.difference for part in parts.values()])),
        "standard_error": math.sqrt(sum(part.standard_error**2 for part in parts.values())) / len(parts),
        "interval": [float(low), float(high)],
    }
