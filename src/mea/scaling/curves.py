"""The fit of one cell: its constants with intervals, and what it predicts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.scaling.bootstrap import Draws, SeedNoise, interval
from mea.scaling.power_law import PowerLaw, fit_power_law
from mea.scaling.runs import Cell

LEAST = 5  # evaluations that a fit needs


@dataclass(frozen=True)
class CellFit:
    """A fit over the whole run, and one over its first part that predicts the rest; arrays are replicates.

    ``early`` is the loss where the first part ends, ``held`` the loss at the end of the run as predicted from the first
    part, ``actual`` the loss at the end, ``far`` the loss at the horizon as predicted from the whole run.
    """

    arm: str
    lr: float
    seeds: list[int]
    tokens: NDArray
    losses: NDArray
    law: PowerLaw
    laws: PowerLaw
    part: PowerLaw
    part_end: float
    horizon: float
    early: NDArray
    held: NDArray
    actual: NDArray
    far: NDArray

    @property
    def early_value(self) -> float:
        return float(np.exp(np.log(self.losses).mean(0))[self.tokens <= self.part_end][-1])

    @property
    def held_value(self) -> float:
        return float(self.part(self.tokens[-1]))

    @property
    def far_value(self) -> float:
        return float(self.law(self.horizon))

    @property
    def actual_value(self) -> float:
        return float(np.exp(np.log(self.losses[:, -1]).mean()))

    @property
    def error_interval(self) -> list[float]:
        """Of the relative error of the prediction: predicted and actual loss of a replicate go together."""
        return interval(self.held / self.actual - 1)

    @property
    def covered(self) -> bool:
        """Whether no error is a possible value of the error."""
        low, high = self.error_interval
        return low <= 0 <= high

    def summary(self) -> dict[str, Any]:
        """For the record's results."""
        mean = np.log(self.losses).mean(0)
        constants = {
            name: {"value": float(getattr(self.law, name)), "interval": interval(getattr(self.laws, name))}
            for name in ("exponent", "scale", "floor")
        }
        return {
            "arm": self.arm,
            "lr": self.lr,
            "seeds": self.seeds,
            **constants,
            "residual": float(np.sqrt(np.mean((np.log(self.law(self.tokens)) - mean) ** 2))),
            "exponent_at_edge": bool(self.law.at_edge),
            "replicates_at_edge": float(self.laws.at_edge.mean()),
            "held": {
                "from_tokens": self.part_end,
                "predicted": self.held_value,
                "interval": interval(self.held),
                "actual": self.actual_value,
                "error": self.held_value / self.actual_value - 1,
                "error_interval": self.error_interval,
            },
            "horizon": {"tokens": self.horizon, "predicted": self.far_value, "interval": interval(self.far)},
        }

    def samples(self) -> dict[str, Any]:
        """The curve that was fitted."""
        return {
            "arm": self.arm,
            "lr": self.lr,
            "tokens": self.tokens.tolist(),
            "losses": self.losses.tolist(),
            "fitted": self.law(self.tokens).tolist(),
            "predicted": self.part(self.tokens).tolist(),
        }


def fit_cell(
    cell: Cell, draws: Draws, noise: SeedNoise | None, *, skip: float, held: float, horizon: float
) -> CellFit | None:
    """Fit a cell; None if a run of it diverged or there are too few evaluations.

    Parameters
    ----------
    skip, held, horizon
        As in `mea.scaling.FitSettings`.
    """
    tokens, losses = cell.curves()
    if cell.diverged or not len(tokens):
        return None
    begin = max(skip * tokens[-1], max(run.warmup for run in cell.runs))
    losses, tokens = losses[:, tokens > begin], tokens[tokens > begin]
    first = tokens <= held * tokens[-1] * (1 + 1e-9) if len(tokens) else np.empty(0, bool)
    if first.sum() < LEAST:
        return None
    mean = np.exp(np.log(losses).mean(0))
    law, part = fit_power_law(tokens, mean), fit_power_law(tokens[first], mean[first])
    residual = np.log(mean / law(tokens))
    curves = draws.curves(cell, tokens, losses, residual, noise)
    laws = fit_power_law(tokens, curves, delta=law.delta)
    parts = fit_power_law(tokens[first], curves[:, first], delta=part.delta)
    target = horizon * tokens[-1]
    return CellFit(
        arm=cell.arm,
        lr=cell.lr,
        seeds=cell.seeds,
        tokens=tokens,
        losses=losses,
        law=law,
        laws=laws,
        part=part,
        part_end=float(tokens[first][-1]),
        horizon=float(target),
        early=curves[:, first][:, -1],
        held=parts(tokens[-1]),
        actual=curves[:, -1],
        far=laws(target),
    )
