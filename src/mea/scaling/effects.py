"""Differences between arms at their own best learning rates, and the factorial effects of mixing and norm."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.scaling.bootstrap import interval
from mea.scaling.runs import Cell

MIXINGS = ("none", "k", "v", "kv")


def differences(best: Mapping[str, Cell], fixed: Mapping[str, NDArray], chosen: Mapping[str, NDArray]) -> list[dict]:
    """Second arm minus first in final loss, for every pair of arms.

    Parameters
    ----------
    best
        Arm -> the cell at its own best learning rate.
    fixed, chosen
        Arm -> replicates of its loss at that learning rate, and from `pick`, which counts the choice of the learning
        rate as uncertain too.
    """
    pairs = []
    for first, second in combinations(best, 2):
        delta = fixed[second] - fixed[first]
        again = chosen[second] - chosen[first]
        pairs.append(
            {
                "first": first,
                "second": second,
                "difference": float(best[second].finals.mean() - best[first].finals.mean()),
                "interval": interval(delta),
                "interval_with_choice": interval(again),
                "probability_lower": float((again < 0).mean()),
                "pairs": len(set(best[first].seeds) & set(best[second].seeds)),
            }
        )
    return pairs


def factorial_effects(best: Mapping[str, Cell], chosen: Mapping[str, NDArray]) -> list[dict[str, Any]]:
    """Effects of mixing the keys, mixing the values and the norm, and their interactions, each in nats per token.

    An effect is the mean loss with the factor less the mean loss without it, over the other factors; an interaction
    is the effect of one where the other is on less that where it is off (halved, as usual in 2^n designs). Arms that
    are not one of the eight of the design are left out; if one of the eight is missing, there are no effects.
    """
    arms: dict[tuple[int, int, int], str] = {}
    for arm, cell in best.items():
        factors = cell.runs[0].factors
        mixing = str(factors.get("mixing", "")).lower()
        if mixing in MIXINGS and "norm" in factors:
            arms.setdefault((int("k" in mixing), int("v" in mixing), int(bool(factors["norm"]))), arm)
    if len(arms) < 8:
        return []
    corners = sorted(arms)
    signs = 2 * np.array(corners) - 1
    losses = np.array([best[arms[corner]].finals.mean() for corner in corners])
    replicates = np.stack([chosen[arms[corner]] for corner in corners], 1)
    names = ("keys mixed", "values mixed", "norm")
    effects = []
    for size in (1, 2, 3):
        for group in combinations(range(3), size):
            contrast = signs[:, list(group)].prod(1) / 4
            effects.append(
                {
                    "effect": " × ".join(names[i] for i in group),
                    "value": float(contrast @ losses),
                    "interval": interval(replicates @ contrast),
                }
            )
    return effects


def pick(trials: Sequence[NDArray], losses: Sequence[NDArray]) -> NDArray:
    """Replicates of the loss at the learning rate that is chosen.

    In each replicate the lowest of the `trials` chooses the learning rate, and the independent `losses` give its loss:
    the lowest of several noisy losses is too low, the more so the more learning rates there are.

    Parameters
    ----------
    trials, losses
        For every learning rate two independent sets of replicates ``[count]``.
    """
    best = np.stack(trials, 1).argmin(1)
    return np.take_along_axis(np.stack(losses, 1), best[:, None], 1)[:, 0]
