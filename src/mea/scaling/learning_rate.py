"""The choice of a learning rate, its uncertainty, and the cost of a wrong one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from mea.scaling.runs import Cell
from mea.scaling.stability import has_spike


def spiked(cell: Cell) -> list[bool]:
    """For every run, whether it diverged or its training loss has a spike."""
    return [run.diverged or has_spike(run.train_loss) for run in cell.runs]


def papers_rule(cells: Sequence[Cell]) -> Cell | None:
    """The largest learning rate without a loss spike in any run (arXiv 2601.19611); None if all have one."""
    calm = [cell for cell in cells if not any(spiked(cell))]
    return max(calm, key=lambda cell: cell.lr, default=None)


def papers_rule_replicates(cells: Sequence[Cell], count: int, seed: int) -> NDArray:
    """What the rule chooses if every learning rate is tried with one of its seeds: ``[count]`` indices into `cells`.

    Where every learning rate has a spike, the lowest is taken.
    """
    generator = np.random.default_rng([seed, 3])
    order = np.argsort([cell.lr for cell in cells])
    chosen = np.full(count, order[0])
    for index in order:
        flags = np.array(spiked(cells[index]))
        calm = ~flags[generator.integers(len(flags), size=count)]
        chosen = np.where(calm, index, chosen)
    return chosen


def sensitivity(lrs: NDArray, losses: NDArray, initial: float) -> NDArray:
    """Learning-rate sensitivity of Wortsman et al. (arXiv 2309.14322): ``E[min(ℓ(η), ℓ_0) - ℓ*]``, in nats per token.

    The expectation is over learning rates whose logarithm is uniform between the least and the greatest (by the
    trapezoid rule, so that a grid need not be even); ``ℓ*`` is the least of the losses.

    Parameters
    ----------
    lrs : array ``[n]``
        Increasing.
    losses : array ``[..., n]``
    initial
        The paper's ``ℓ_0``: the loss before training, which a diverged run is taken to return to.
    """
    clipped = np.minimum(losses, initial)
    excess = clipped - clipped.min(-1, keepdims=True)
    logs = np.log(lrs)
    return np.asarray(np.trapezoid(excess, logs, axis=-1) / (logs[-1] - logs[0]))


def choice_quality(chosen: NDArray, truth: NDArray, measured: NDArray) -> dict[str, float]:
    """Quality of choices when the true losses are uncertain too.

    Regret uses the measured losses: with few seeds the tails of the replicates have no mean.

    Parameters
    ----------
    chosen : array ``[count]``
        Index of the learning rate that a rule takes in each replicate.
    truth : array ``[count, lrs]``
        Replicates of the true losses.
    measured : array ``[lrs]``
        The losses that were measured.

    Returns
    -------
    dict
        ``probability`` of having chosen the best learning rate, and mean ``regret``: the loss above the best one.
    """
    return {
        "probability": float((chosen == truth.argmin(1)).mean()),
        "regret": float((measured[chosen] - measured.min()).mean()),
    }


def rank_correlation(first: NDArray, second: NDArray) -> NDArray:
    """Spearman's correlation along the last axis; NaN where all values of one are equal."""
    a, b = rankdata(first, axis=-1), rankdata(second, axis=-1)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def finite(value: Any) -> float | None:
    """A number, or None for NaN and infinity, which JSON lacks."""
    return float(value) if np.isfinite(value) else None
