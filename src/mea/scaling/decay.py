"""Does a choice made on runs at a constant learning rate hold for runs with decay?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.scaling.bootstrap import Draws, interval
from mea.scaling.curves import CellFit
from mea.scaling.learning_rate import choice_quality, finite, papers_rule_replicates, rank_correlation
from mea.scaling.runs import CONSTANT, Cell

Key = tuple[str, float]  # arm and learning rate
LEAST = 3  # cells that an order needs


def after_decay(
    cells: Sequence[Cell],
    losses: Mapping[str, Mapping[Key, NDArray]],
    fits: Mapping[Key, CellFit],
    draws: Draws,
) -> list[dict[str, Any]]:
    """For every schedule with decay and every arm, then all arms together: order of the losses, and choices.

    Parameters
    ----------
    cells
        Cells of all schedules.
    losses
        Schedule -> arm and learning rate -> replicates of the final loss.
    fits
        Fits of the cells at a constant learning rate.

    Returns
    -------
    Lines with the rank correlation of losses at the constant learning rate with those after decay over the cells that
    have both. Under ``rules`` stands what each rule chooses at a constant learning rate, how often that is the best
    after decay, and what it loses on average by the losses measured: ``"constant"`` by the loss at the end,
    ``"early"`` by the loss where the first part ends, ``"held"`` by what the fit to that part predicts, ``"far"`` by
    what the whole run's fit predicts at the horizon, ``"paper"`` by the paper's rule. In the line of all arms a choice
    is of arm and learning rate, which the paper's rule does not make.
    """
    constant = {(cell.arm, cell.lr): cell for cell in cells if cell.schedule == CONSTANT}
    lines = []
    for schedule in dict.fromkeys(cell.schedule for cell in cells if cell.schedule != CONSTANT):
        decayed = {(c.arm, c.lr): c for c in cells if c.schedule == schedule and (c.arm, c.lr) in constant}
        arms = list(dict.fromkeys(arm for arm, _ in decayed))
        for arm in [*arms, None] if len(arms) > 1 else arms:
            keys = [key for key in decayed if arm in (key[0], None)]
            if len(keys) >= LEAST:
                line = {"arm": arm or "all arms", "schedule": schedule, "lrs": [lr for _, lr in keys]}
                lines.append(line | _line(arm, keys, constant, decayed, losses, fits, draws))
    return lines


def _line(
    arm: str | None,
    keys: Sequence[Key],
    constant: Mapping[Key, Cell],
    decayed: Mapping[Key, Cell],
    losses: Mapping[str, Mapping[Key, NDArray]],
    fits: Mapping[Key, CellFit],
    draws: Draws,
) -> dict[str, Any]:
    schedule = decayed[keys[0]].schedule
    before, after = (np.stack([losses[s][key] for key in keys], 1) for s in (CONSTANT, schedule))
    first, second = (np.array([group[key].finals.mean() for key in keys]) for group in (constant, decayed))
    rules = {"constant": _judged(keys, first, before, after, second)}
    for name in ("early", "held", "far"):
        values, replicates = _by_fit(keys, fits, name, draws.count)
        if np.isfinite(values).any():
            rules[name] = _judged(keys, values, replicates, after, second)
    if arm is not None:
        chosen = papers_rule_replicates([constant[key] for key in keys], draws.count, draws.seed)
        rules["paper"] = choice_quality(chosen, after, second)
    best, decayed_best = keys[int(first.argmin())], keys[int(second.argmin())]
    return {
        "correlation": finite(rank_correlation(first, second)),
        "interval": interval(rank_correlation(before, after)),
        "best_constant": best[1],
        "best_constant_arm": best[0],
        "best_decayed": decayed_best[1],
        "best_decayed_arm": decayed_best[0],
        "gain": float((first - second).mean()),
        "rules": rules,
    }


def _by_fit(keys: Sequence[Key], fits: Mapping[Key, CellFit], name: str, count: int) -> tuple[NDArray, NDArray]:
    """What fits say of every cell, and the replicates ``[count, cells]``; infinite where there is no fit."""
    values, replicates = np.full(len(keys), np.inf), np.full((count, len(keys)), np.inf)
    for index, key in enumerate(keys):
        if key in fits:
            values[index] = getattr(fits[key], f"{name}_value")
            replicates[:, index] = getattr(fits[key], name)
    return values, replicates


def _judged(
    keys: Sequence[Key], values: NDArray, replicates: NDArray, after: NDArray, measured: NDArray
) -> dict[str, Any]:
    """What is chosen, and how good choices of the replicates are."""
    arm, lr = keys[int(values.argmin())]
    return {"arm": arm, "lr": lr} | choice_quality(replicates.argmin(1), after, measured)
