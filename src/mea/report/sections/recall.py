"""Accuracy of pretraining runs on associative recall: against the number of pairs, and over training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mea.records import Record
from mea.report.formatting import learning_rate, with_interval
from mea.report.parts import Figure, Part, Table
from mea.report.render.svg import axes_of_a_figure, legend, line, style, svg
from mea.report.sections.pretraining_curves import MILLION, TOKENS, arm_of, arms_of

PERCENT = "accuracy, %"
SEEDS = "from the lowest to the highest seed"


def part(runs: Sequence[Record], suffix: str = "") -> Part | None:
    """A table and two figures of the runs with an accuracy; None if there is none."""
    scored = [run for run in runs if run["samples"].get("accuracy")]
    if not scored:
        return None
    pairs = scored[0]["config"]["pairs"]
    scored = [run for run in scored if run["config"]["pairs"] == pairs]
    best = {arm: _best([run for run in scored if arm_of(run) == arm]) for arm in arms_of(scored)}
    schedule = scored[0]["config"].get("schedule", "constant")
    figures = [_over_training(best, schedule)]
    if len(pairs) > 1:
        figures.insert(0, _against_pairs(best, pairs, schedule))
    return Part(f"Accuracy of recall{suffix}", table=_table(best, pairs), figures=figures)


def _best(runs: Sequence[Record]) -> list[Record]:
    """The runs at the learning rate with the lowest mean loss; a run that diverged makes it the last choice."""

    def loss(lr: float) -> float:
        ends = [run["results"].get("validation_loss") for run in runs if run["config"]["learning_rate"] == lr]
        return float(np.mean([np.inf if end is None else end for end in ends]))

    best = min(sorted({run["config"]["learning_rate"] for run in runs}), key=loss)
    return [run for run in runs if run["config"]["learning_rate"] == best]


def _ends(runs: Sequence[Record]) -> NDArray:
    """Accuracies at the end in percent ``[seeds, pairs]``."""
    return 100 * np.array([run["samples"]["accuracy"][-1] for run in runs])


def _half(runs: Sequence[Record]) -> str:
    """Million tokens until half of the answers are right, over the seeds that come so far."""
    found = []
    for run in runs:
        right = np.array([np.mean(entry) for entry in run["samples"]["accuracy"]]) >= 0.5
        if right.any():
            found.append(run["samples"]["validation_tokens"][int(right.argmax())] / MILLION)
    if not found:
        return "–"
    told = with_interval(float(np.mean(found)), (min(found), max(found)) if len(found) > 1 else None, 2)
    return told if len(found) == len(runs) else f"{told}, {len(found)} of {len(runs)} seeds"


def _table(best: dict[str, list[Record]], pairs: list[int]) -> Table:
    lines = []
    for arm, runs in best.items():
        ends = _ends(runs)
        means, several = np.column_stack([ends.mean(1), ends]), len(runs) > 1
        cells = [with_interval(c.mean(), (c.min(), c.max()) if several else None, 1) for c in means.T]
        lines.append([arm, learning_rate(runs[0]["config"]["learning_rate"]), str(len(runs)), _half(runs), *cells])
    note = (
        f"Accuracy of answers in %, at the end, each variant at its learning rate with the lowest loss: mean, {SEEDS}. "
        "Million tokens until half of the answers are right, at the validation that shows it."
    )
    header = ["variant", "learning rate", "seeds", "tokens to half", "mean", *(f"{count} pairs" for count in pairs)]
    top = max(range(len(lines)), key=lambda index: _ends(list(best.values())[index]).mean())
    return Table(header, lines, note, best=(top,))


def _against_pairs(best: dict[str, list[Record]], pairs: list[int], schedule: str) -> Figure:
    with style(f"recall-pairs-{schedule}"):
        figure, axes = axes_of_a_figure("pairs in a row", PERCENT)
        for index, (arm, runs) in enumerate(best.items()):
            ends = _ends(runs)
            bars = np.maximum(0, [ends.mean(0) - ends.min(0), ends.max(0) - ends.mean(0)])
            axes.errorbar(pairs, ends.mean(0), yerr=bars, label=arm, **line(index, size=5))
        axes.set_xscale("log")
        axes.set_xticks(pairs, list(map(str, pairs)))
        axes.set_xticks([], minor=True)
        legend(figure, axes)
        text = f"Accuracy against the number of pairs, each variant at its best learning rate. Bars: {SEEDS}."
        return Figure(f"recall-pairs-{schedule}", svg(figure), text)


def _over_training(best: dict[str, list[Record]], schedule: str) -> Figure:
    with style(f"recall-tokens-{schedule}"):
        figure, axes = axes_of_a_figure(TOKENS, PERCENT)
        for index, (arm, runs) in enumerate(best.items()):
            count = min(len(run["samples"]["accuracy"]) for run in runs)
            curves = [[100 * np.mean(entry) for entry in run["samples"]["accuracy"][:count]] for run in runs]
            tokens = np.array(runs[0]["samples"]["validation_tokens"][:count]) / MILLION
            axes.plot(tokens, np.mean(curves, 0), label=arm, **line(index, size=4))
        legend(figure, axes)
        text = "Mean accuracy over training, each variant at its best learning rate: mean over seeds."
        return Figure(f"recall-tokens-{schedule}", svg(figure), text)
