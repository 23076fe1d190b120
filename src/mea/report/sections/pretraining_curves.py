"""Figures of pretraining, in the form of the paper's: curves with fits, rate against loss, variants at their best."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.records import Record
from mea.report.parts import Figure
from mea.report.render.svg import COLOURS, INK, axes_of_a_figure, legend, line, style, svg

BINS = 150  # points of a training curve
HIGHEST = 1.2  # times the lowest loss: cells further away would press the others flat
MILLION = 1e6
BASELINE = "transformer"  # stands first
CONSTANT = "constant"


def of_arms(runs: Sequence[Record], fit: Record | None, schedule: str) -> list[Figure]:
    """For every arm its losses at every rate, and the fitted laws, all on the same axes' ranges."""
    if not runs:
        return []
    fitted = [curve for curve in fit["samples"]["curves"] if curve["schedule"] == schedule] if fit else []
    rates = sorted({record["config"]["learning_rate"] for record in runs})
    limits = _limits(runs)
    drawn = []
    for arm in arms_of(runs):
        chosen = [record for record in runs if arm_of(record) == arm]
        name = f"loss-{arm}-{schedule}"
        with style(name):
            figure, axes = axes_of_a_figure()
            for value in sorted({record["config"]["learning_rate"] for record in chosen}):
                colour = COLOURS[rates.index(value) % len(COLOURS)]
                cell = [record for record in chosen if record["config"]["learning_rate"] == value]
                steps, losses = _training(cell[0])
                axes.plot(steps / MILLION, losses, color=colour, linewidth=0.8, alpha=0.45)
                tokens, means = _validation(cell)
                look = line(rates.index(value), size=4) | {"linestyle": "none"}
                axes.plot(tokens / MILLION, means, label=f"{value:.3g}", **look)
                for law in (c for c in fitted if (c["arm"], c["rate"]) == (arm, value)):
                    x = np.array(law["tokens"]) / MILLION
                    axes.plot(x, law["fitted"], color=colour, linewidth=1.4, linestyle="--")
            axes.set_ylim(*limits)
            axes.set_xlim(left=0)
            axes.set_xlabel("tokens, millions")
            axes.set_ylabel("loss, nats per token")
            legend(figure, axes)
            drawn.append(Figure(name, svg(figure), f"{arm}, by learning rate."))
    return drawn


def rate_against_loss(group: dict[str, Any], schedule: str) -> list[Figure]:
    """Final loss against the learning rate, a line for every arm; once more without the cells that are far off."""
    cells = group["cells"]
    if len({cell["rate"] for cell in cells}) < 2:
        return []
    text = "Every variant at every rate, a diverged one with the loss before training. Bars: 95 % intervals."
    drawn = [_rates(f"rates-{schedule}", group, cells, text)]
    top = HIGHEST * min(cell["loss"] for cell in cells)
    near = [cell for cell in cells if cell["loss"] <= top]
    if len(near) < len(cells):
        text = f"The same, up to {HIGHEST} times the lowest loss. Bars: 95 % intervals."
        drawn.append(_rates(f"rates-near-{schedule}", group, near, text))
    return drawn


def _rates(name: str, group: dict[str, Any], cells: list[dict[str, Any]], text: str) -> Figure:
    with style(name):
        figure, axes = axes_of_a_figure()
        for index, arm in enumerate(_names(group)):
            own = sorted((cell for cell in cells if cell["arm"] == arm), key=lambda cell: cell["rate"])
            losses = [cell["loss"] for cell in own]
            axes.errorbar([cell["rate"] for cell in own], losses, yerr=_bars(own), label=arm, **line(index, size=5))
        axes.set_xscale("log")
        rates = sorted({cell["rate"] for cell in cells})
        axes.set_xticks(rates, [f"{value:.3g}" for value in rates])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("final validation loss, nats per token")
        legend(figure, axes)
        return Figure(name, svg(figure), text)


def at_best_rates(runs: Sequence[Record], group: dict[str, Any], schedule: str) -> Figure | None:
    """Validation loss of every arm at its own best rate, over the second half of the tokens."""
    with style(f"best-{schedule}"):
        figure, axes = axes_of_a_figure()
        shown = []
        for index, arm in enumerate(group["arms"]):
            cell = [r for r in runs if arm_of(r) == arm["arm"] and r["config"]["learning_rate"] == arm["best_rate"]]
            if not cell or any(record["results"].get("diverged") for record in cell):
                continue
            tokens, means = _validation(cell)
            late = tokens >= tokens[-1] / 2
            label = f"{arm['arm']} at {arm['best_rate']:.3g}"
            axes.plot(tokens[late] / MILLION, means[late], label=label, **line(index, size=5))
            shown.append(arm)
        if not shown:
            return None
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel("validation loss, nats per token")
        legend(figure, axes)
        text = "Every variant at its own best rate of those tried, mean over seeds, from half of the tokens on."
        return Figure(f"best-{schedule}", svg(figure), text)


def differences(group: dict[str, Any], schedule: str) -> Figure | None:
    """Differences to the first arm with the intervals that count the choice of the rate."""
    if not group["differences"]:
        return None
    first = group["differences"][0]["first"]
    found = [d for d in group["differences"] if d["first"] == first]
    entries = [(d["second"], d["difference"], d["interval_with_choice"]) for d in found]
    drawn = _forest(f"differences-{schedule}", entries, f"loss less that of {first}, nats per token")
    text = (
        f"Left of the line: lower than {first}, each at its own best rate. 95 % intervals, choice of the rate included."
    )
    return Figure(f"differences-{schedule}", drawn, text)


def effects(group: dict[str, Any], schedule: str) -> Figure | None:
    """The factorial effects."""
    if not group["effects"]:
        return None
    entries = [(e["effect"], e["value"], e["interval"]) for e in group["effects"]]
    drawn = _forest(f"effects-{schedule}", entries, "change of the loss, nats per token")
    return Figure(f"effects-{schedule}", drawn, "Left of the line: lowers the loss. 95 % intervals.")


def spikes(group: dict[str, Any], schedule: str) -> Figure | None:
    """Spike score of the gradient norm, or of the loss where there is no norm, against the rate; None if all are 0."""
    kind = "grad_norm" if any("grad_norm" in cell["spikes"] for cell in group["cells"]) else "train_loss"
    cells = [cell for cell in group["cells"] if kind in cell["spikes"]]
    if not any(cell["spikes"][kind]["score"] > 0 for cell in cells) or len({c["rate"] for c in cells}) < 2:
        return None
    with style(f"spikes-{schedule}"):
        figure, axes = axes_of_a_figure()
        for index, arm in enumerate(_names(group)):
            own = sorted((cell for cell in cells if cell["arm"] == arm), key=lambda cell: cell["rate"])
            scores = [100 * cell["spikes"][kind]["score"] for cell in own]
            axes.plot([cell["rate"] for cell in own], scores, label=arm, **line(index, size=5))
        axes.set_xscale("log")
        rates = sorted({cell["rate"] for cell in cells})
        axes.set_xticks(rates, [f"{value:.3g}" for value in rates])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("spike score, % of steps")
        legend(figure, axes)
        what = "gradient norm" if kind == "grad_norm" else "training loss"
        text = f"Steps at which the {what} is seven or more standard deviations off. Intervals: in the table."
        return Figure(f"spikes-{schedule}", svg(figure), text)


def predictions(group: dict[str, Any], schedule: str) -> Figure | None:
    """Loss at the end as predicted from the first part of each run, against the actual one."""
    fits = [fit for fit in group["fits"] if fit["held"]["interval"]]
    if len(fits) < 2:
        return None
    with style(f"predictions-{schedule}"):
        figure, axes = axes_of_a_figure()
        for index, arm in enumerate(_names(group)):
            held = [fit["held"] for fit in fits if fit["arm"] == arm]
            if held:
                predicted = np.array([h["predicted"] for h in held])
                ends = np.array([h["interval"] for h in held]).T
                bars = np.maximum(0, [predicted - ends[0], ends[1] - predicted])
                look = line(index, size=5) | {"linestyle": "none"}
                axes.errorbar([h["actual"] for h in held], predicted, yerr=bars, label=arm, **look)
        ends = [min(f["held"]["actual"] for f in fits), max(f["held"]["actual"] for f in fits)]
        axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("actual loss at the end")
        axes.set_ylabel("predicted")
        legend(figure, axes)
        text = "Predicted by a fit to the first part of each run. On the dotted line: right. Bars: 95 % intervals."
        return Figure(f"predictions-{schedule}", svg(figure), text)


def after_decay(groups: dict[str, Any], schedule: str) -> Figure | None:
    """Loss after decay against the loss at a constant rate, a marker for every arm and rate that has both."""
    if schedule == CONSTANT or not {schedule, CONSTANT} <= set(groups):
        return None
    before, after = (
        {(cell["arm"], cell["rate"]): cell for cell in groups[name]["cells"]} for name in (CONSTANT, schedule)
    )
    keys = sorted(key for key in after if key in before)
    top = HIGHEST * min(cell["loss"] for cell in before.values())
    keys = [key for key in keys if before[key]["loss"] <= top]
    if len(keys) < 2:
        return None
    with style(f"decay-{schedule}"):
        figure, axes = axes_of_a_figure()
        for index, arm in enumerate(_names(groups[CONSTANT])):
            own = [key for key in keys if key[0] == arm]
            if own:
                bars = {"xerr": _bars([before[key] for key in own]), "yerr": _bars([after[key] for key in own])}
                look = line(index, size=5) | {"linestyle": "none", "elinewidth": 0.8}
                losses = ([group[key]["loss"] for key in own] for group in (before, after))
                axes.errorbar(*losses, **bars, label=arm, **look)
        axes.set_xlabel("loss at a constant rate, nats per token")
        axes.set_ylabel("loss after decay")
        legend(figure, axes)
        text = "Variants at every rate that was run both ways, over the same tokens. Bars: 95 % intervals."
        return Figure(f"decay-{schedule}", svg(figure), text)


def _forest(name: str, entries: Sequence[tuple[str, float, Sequence[float]]], label: str) -> str:
    with style(name):
        figure, axes = axes_of_a_figure()
        figure.set_figheight(0.9 + 0.34 * len(entries))
        for index, (_, value, ends) in enumerate(entries):
            low, high = ends or (value, value)
            axes.plot([low, high], [index, index], color=COLOURS[0], linewidth=1.8)
            axes.plot([value], [index], **line(0, size=6))
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(entries)), [name for name, _, _ in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlabel(label)
        return svg(figure)


def _limits(runs: Sequence[Record]) -> tuple[float, float]:
    """Range of losses to show: from below the lowest to what the slowest good run has after a tenth of the tokens."""
    low, high = [], []
    for record in runs:
        tokens, losses = _validation([record])
        if len(losses):
            low.append(float(losses.min()))
            high.append(float(losses[np.searchsorted(tokens, 0.1 * tokens[-1])]))
    best = min(low)
    return best - 0.05 * best, min(max(high), 1.6 * best)


def _training(record: Record) -> tuple[NDArray, NDArray]:
    """Tokens and training loss, in at most `BINS` means."""
    values = record["samples"].get("train_loss") or []
    losses = np.array([np.nan if value is None else value for value in values], float)
    if not len(losses):
        return np.empty(0), np.empty(0)
    width = max(1, len(losses) // BINS)
    kept = losses[: len(losses) // width * width].reshape(-1, width).mean(1)
    planned, done = record["config"]["tokens"], record["samples"].get("validation_tokens") or [0]
    total = done[-1] if record["results"].get("diverged") and done[-1] else planned
    return (np.arange(len(kept)) + 0.5) * total / len(kept), kept


def _validation(cell: Sequence[Record]) -> tuple[NDArray, NDArray]:
    """Tokens and mean validation loss over the runs, where all have a finite one."""
    curves = []
    for record in cell:
        samples = record["samples"]
        pairs = zip(samples.get("validation_tokens") or [], samples.get("validation_loss") or [], strict=True)
        curves.append({tokens: loss for tokens, loss in pairs if tokens and loss is not None})
    shared = sorted(set.intersection(*map(set, curves)))
    return np.array(shared, float), np.array([np.mean([curve[t] for curve in curves]) for t in shared])


def _bars(cells: Sequence[dict[str, Any]]) -> NDArray:
    ends = [(cell["interval"] or (cell["loss"], cell["loss"]), cell["loss"]) for cell in cells]
    return np.array([[max(0, loss - low), max(0, high - loss)] for (low, high), loss in ends]).reshape(-1, 2).T


def arm_of(record: Record) -> str:
    """What a run counts for in comparisons."""
    return str(record["config"].get("arm") or record["config"]["variant"])


def arms_of(runs: Iterable[Record]) -> list[str]:
    """The arms of runs, the baseline first."""
    return sorted(dict.fromkeys(arm_of(record) for record in runs), key=lambda arm: arm != BASELINE)


def _names(group: dict[str, Any]) -> list[str]:
    return [arm["arm"] for arm in group["arms"]]
