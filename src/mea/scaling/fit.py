"""From pretraining records to the record of a fit: everything that `mea fit` prints and draws."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.records import Progress, Record, make_record
from mea.scaling.bootstrap import Draws, SeedNoise, interval, pooled_noise
from mea.scaling.curves import CellFit, fit_cell
from mea.scaling.decay import after_decay
from mea.scaling.effects import differences, factorial_effects, pick
from mea.scaling.learning_rate import (
    choice_quality,
    finite,
    papers_rule,
    papers_rule_replicates,
    rank_correlation,
    sensitivity,
    spiked,
)
from mea.scaling.runs import CONSTANT, Cell, cells_of, read_runs
from mea.scaling.stability import score_with_interval


@dataclass(frozen=True)
class FitSettings:
    """How fits are made.

    Attributes
    ----------
    draws : int
        Bootstrap replicates.
    seed : int
        Seed of the replicates.
    skip : float
        Share of a run's first tokens that is not fitted: no power law holds during the warm-up.
    held : float
        Share of the tokens from which the fit predicts the rest.
    horizon : float
        Length of training for which a choice is made, in multiples of the runs' tokens (the paper: 50B to 500B tokens).
    """

    draws: int = 4000
    seed: int = 0
    skip: float = 0.1
    held: float = 0.5
    horizon: float = 10.0

    def __post_init__(self) -> None:
        if self.draws < 100:
            raise ValueError(f"draws is {self.draws}; an interval needs 100 or more")
        if not 0 <= self.skip < self.held < 1:
            raise ValueError(f"0 <= skip < held < 1 must hold; skip is {self.skip:g}, held {self.held:g}")
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon:g}; it must be 1 or more")


def fit_records(
    records: Iterable[Record], settings: FitSettings | None = None, *, progress: Progress | None = None
) -> Record:
    """Fit all runs among `records`.

    Returns
    -------
    Record
        Of the kind ``"fit"``. ``results.groups`` holds, for every schedule, ``cells`` (final losses, spikes),
        ``fits`` (of runs at a constant learning rate: with decay no power law holds to the end), ``arms`` (learning
        rates chosen, sensitivity), ``differences`` and ``effects``; ``results.after_decay`` compares choices made at a
        constant learning rate with the losses after decay. ``samples.curves`` are the mean curves that were fitted.

    Raises
    ------
    ValueError
        As `read_runs` and `cells_of`.
    """
    settings = settings or FitSettings()
    records = list(records)
    cells = cells_of(read_runs(records))
    draws = Draws(settings.draws, settings.seed)
    groups, curves, losses, fits = {}, [], {}, {}
    for schedule in dict.fromkeys(cell.schedule for cell in cells):
        chosen = [cell for cell in cells if cell.schedule == schedule]
        groups[schedule], losses[schedule], fitted = _group(chosen, draws, settings, progress)
        curves += [{"schedule": schedule} | fit.samples() for fit in fitted.values()]
        fits |= fitted
    results: dict[str, Any] = {"groups": groups, "after_decay": after_decay(cells, losses, fits, draws)}
    config = asdict(settings) | {
        "preset": cells[0].runs[0].preset,
        "tokens": cells[0].runs[0].planned,
        "runs": sum(len(cell.runs) for cell in cells),
        "commits": sorted({str(r["commit"]) for r in records if r["kind"] == "pretraining"}),
    }
    return make_record("fit", config, results=results, samples={"curves": curves}, seeds={"replicates": settings.seed})


def _group(
    cells: list[Cell], draws: Draws, settings: FitSettings, progress: Progress | None
) -> tuple[dict[str, Any], dict[tuple[str, float], NDArray], dict[tuple[str, float], CellFit]]:
    """The cells of one schedule; replicates of final losses, and fits, by arm and learning rate."""
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    overall = pooled_noise(cells)
    noise = {arm: pooled_noise([cell for cell in cells if cell.arm == arm]) or overall for arm in arms}
    losses = {(cell.arm, cell.lr): draws.finals(cell, noise[cell.arm]) for cell in cells}
    fits: dict[tuple[str, float], CellFit] = {}
    for done, cell in enumerate(cells if cells[0].schedule == CONSTANT else ()):
        fit = fit_cell(cell, draws, noise[cell.arm], skip=settings.skip, held=settings.held, horizon=settings.horizon)
        if fit is not None:
            fits[cell.arm, cell.lr] = fit
        if progress:
            progress(f"fits ({cells[0].schedule})", done + 1, len(cells))
    by_arm = {arm: [cell for cell in cells if cell.arm == arm] for arm in arms}
    best = {arm: min(group, key=lambda cell: cell.finals.mean()) for arm, group in by_arm.items()}
    again = Draws(draws.count, draws.seed + 1)
    chosen = {
        arm: pick([again.finals(cell, noise[arm]) for cell in group], [losses[arm, cell.lr] for cell in group])
        for arm, group in by_arm.items()
    }
    fixed = {arm: losses[arm, best[arm].lr] for arm in arms}
    shared = _shared_lrs(by_arm.values())
    return (
        {
            "seed_noise": _noise(overall),
            "cells": [_cell(cell, losses[cell.arm, cell.lr]) for cell in cells],
            "fits": [fit.summary() for fit in fits.values()],
            "arms": [_arm(group, losses, fits, noise[arm], shared, draws) for arm, group in by_arm.items()],
            "differences": differences(best, fixed, chosen),
            "effects": factorial_effects(best, chosen),
            "prediction": _prediction(fits, by_arm),
        },
        losses,
        fits,
    )


def _cell(cell: Cell, replicates: NDArray) -> dict[str, Any]:
    scores = {}
    for name in ("train_loss", "grad_norm"):
        score, low, high, events = score_with_interval([getattr(run, name) for run in cell.runs])
        if np.isfinite(score):
            scores[name] = {"score": score, "interval": [low, high], "events": events}
    return {
        "arm": cell.arm,
        "lr": cell.lr,
        "seeds": cell.seeds,
        "finals": [float(x) for x in cell.finals],
        "loss": float(cell.finals.mean()),
        "interval": interval(replicates),
        "diverged": sum(run.diverged for run in cell.runs),
        "spiked": sum(spiked(cell)),
        "spikes": scores,
    }


def _arm(
    group: list[Cell],
    losses: dict[tuple[str, float], NDArray],
    fits: dict[tuple[str, float], CellFit],
    noise: SeedNoise | None,
    shared: list[float],
    draws: Draws,
) -> dict[str, Any]:
    """The learning rates that the rules choose for one arm, what they cost, and its sensitivity."""
    group = sorted(group, key=lambda cell: cell.lr)
    means = np.array([cell.finals.mean() for cell in group])
    truth = np.stack([losses[cell.arm, cell.lr] for cell in group], 1)
    best, rule = int(means.argmin()), papers_rule(group)
    lrs = np.array([cell.lr for cell in group])

    def judged(chosen: NDArray) -> dict[str, Any]:
        return choice_quality(chosen, truth, means) | {"lrs": interval(lrs[chosen], discrete=True)}

    rules = {"paper": judged(papers_rule_replicates(group, draws.count, draws.seed))}
    fitted = [fits.get((cell.arm, cell.lr)) for cell in group]
    worst = np.full(draws.count, np.inf)  # a learning rate whose runs diverged is never predicted to be best
    for name in ("early", "held", "far"):
        values = np.stack([worst if fit is None else getattr(fit, name) for fit in fitted], 1)
        if np.isfinite(values).any():
            rules[name] = judged(values.argmin(1))
    summary: dict[str, Any] = {
        "arm": group[0].arm,
        "best_lr": group[best].lr,
        "best_inside": 0 < best < len(group) - 1,
        "loss": float(means[best]),
        "interval": interval(truth[:, best]),
        "probability_best": float((truth.argmin(1) == best).mean()),
        "paper_lr": rule.lr if rule else None,
        "paper_loss": float(rule.finals.mean()) if rule else None,
        "predicted_lr": min((f for f in fitted if f), key=lambda f: f.far_value).lr if any(fitted) else None,
        "rules": rules,
        "seed_noise": _noise(noise),
    }
    rated = [index for index, cell in enumerate(group) if cell.lr in shared]
    if len(rated) >= 3:
        initial = float(np.mean([run.initial for run in group[0].runs]))
        if np.isfinite(initial):
            summary["sensitivity"] = float(sensitivity(lrs[rated], means[rated], initial))
            summary["sensitivity_interval"] = interval(sensitivity(lrs[rated], truth[:, rated], initial))
            summary["sensitivity_lrs"] = [float(lrs[rated[0]]), float(lrs[rated[-1]])]
    return summary


def _shared_lrs(groups: Iterable[Sequence[Cell]]) -> list[float]:
    """The learning rates between the ends that all arms reach: sensitivities are over the same range."""
    spans = [[cell.lr for cell in group] for group in groups]
    spans = [span for span in spans if len(span) >= 3] or spans
    low, high = max(map(min, spans)), min(map(max, spans))
    return sorted({lr for span in spans for lr in span if low * 0.999 <= lr <= high * 1.001})


def _prediction(fits: dict[tuple[str, float], CellFit], by_arm: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Rank correlation between the losses predicted from the first part of the runs and those they ended with."""
    lines = []
    for arm in [*by_arm, None]:
        chosen = [fit for (name, _), fit in fits.items() if arm in (name, None)]
        if len(chosen) < 3 or (arm is None and len(by_arm) < 2):
            continue
        actual = np.array([fit.actual_value for fit in chosen])
        line: dict[str, Any] = {"arm": arm or "all arms", "cells": len(chosen)}
        for name in ("held", "early"):
            value = np.array([getattr(fit, f"{name}_value") for fit in chosen])
            replicates = rank_correlation(
                np.stack([getattr(fit, name) for fit in chosen], 1), np.stack([fit.actual for fit in chosen], 1)
            )
            line[name] = {"correlation": finite(rank_correlation(value, actual)), "interval": interval(replicates)}
        errors = np.array([fit.held_value / fit.actual_value - 1 for fit in chosen])
        line |= {"mean_error": float(errors.mean()), "largest_error": float(np.abs(errors).max())}
        line["covered"] = sum(fit.covered for fit in chosen)
        lines.append(line)
    return lines


def _noise(noise: SeedNoise | None) -> dict[str, float] | None:
    return asdict(noise) if noise else None
