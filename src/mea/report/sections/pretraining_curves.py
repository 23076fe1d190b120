"""Figures of pretraining: loss curves with fits, loss against the learning rate, variants at their best."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.records import Record
from mea.report.formatting import learning_rate
from mea.report.parts import Figure
from mea.report.render.svg import (
    COLOURS,
    INK,
    axes_of_a_figure,
    learning_rate_axis,
    legend,
    line,
    short,
    style,
    svg,
)

BINS = 150  # points of a training curve
HIGHEST = 1.2  # times the lowest loss: losses further away would flatten the others
MILLION = 1e6
TOKENS, LOSS = "tokens, millions", "loss, nats per token"
INTERVALS = "Bars: 95 % intervals."
BASELINE = "transformer"  # stands first
CONSTANT = "constant"


def of_arms(runs: Sequence[Record], fit: Record | None, schedule: str) -> list[Figure]:
    """For every arm its losses at every learning rate and the fitted laws, all on axes of the same range."""
    if not runs:
        return []
    laws = [curve for curve in fit["samples"]["curves"] if curve["schedule"] == schedule] if fit else []
    rates = _rates(runs)
    limits = _limits(runs)
    return [
        _arm_figure(arm, [run for run in runs if arm_of(run) == arm], laws, rates, limits, schedule)
        for arm in arms_of(runs)
    ]


def _arm_figure(
    arm: str,
    runs: Sequence[Record],
    laws: Sequence[dict[str, Any]],
    rates: list[float | int],
    limits: tuple[float, float] | None,
    schedule: str,
) -> Figure:
    name = f"loss-{arm}-{schedule}"
    with style(name):
        figure, axes = axes_of_a_figure(TOKENS, LOSS)
        for rate in _rates(runs):
            colour = COLOURS[rates.index(rate) % len(COLOURS)]
            cell = [run for run in runs if run["config"]["learning_rate"] == rate]
            tokens, losses = _training(cell[0])
            axes.plot(tokens / MILLION, losses, color=colour, linewidth=0.8, alpha=0.45)
            tokens, means = _validation(cell)
            look = line(rates.index(rate), size=4) | {"linestyle": "none"}
            axes.plot(tokens / MILLION, means, label=learning_rate(rate), **look)
            for law in (law for law in laws if (law["arm"], law["lr"]) == (arm, rate)):
                tokens = np.array(law["tokens"]) / MILLION
                axes.plot(tokens, law["fitted"], color=colour, linewidth=1.4, linestyle="--")
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        legend(figure, axes)
        return Figure(name, svg(figure), f"{arm}, by learning rate.")


def rate_against_loss(group: dict[str, Any], schedule: str) -> list[Figure]:
    """Final loss against the learning rate, a line for every arm; a second figure leaves out what is far off."""
    cells = group["cells"]
    if len({cell["lr"] for cell in cells}) < 2:
        return []
    text = "Final loss of every variant at every learning rate. A diverged run counts with its loss before training."
    drawn = [_losses_by_rate(f"rates-{schedule}", group, cells, f"{text} {INTERVALS}")]
    top = HIGHEST * min(cell["loss"] for cell in cells)
    near = [cell for cell in cells if cell["loss"] <= top]
    if len(near) < len(cells):
        text = f"The same, up to {HIGHEST} times the lowest loss. {INTERVALS}"
        drawn.append(_losses_by_rate(f"rates-near-{schedule}", group, near, text))
    return drawn


def _losses_by_rate(name: str, group: dict[str, Any], cells: list[dict[str, Any]], text: str) -> Figure:
    with style(name):
        figure, axes = axes_of_a_figure("learning rate", f"final validation {LOSS}")
        for index, own in enumerate(_cells_by_arm(group, cells)):
            losses = [cell["loss"] for cell in own]
            look = line(index, size=5)
            axes.errorbar([cell["lr"] for cell in own], losses, yerr=_bars(own), label=_names(group)[index], **look)
        learning_rate_axis(axes, (cell["lr"] for cell in cells))
        legend(figure, axes)
        return Figure(name, svg(figure), text)


def at_best_rates(runs: Sequence[Record], group: dict[str, Any], schedule: str) -> Figure | None:
    """Validation loss of every arm at its own best learning rate, over the second half of the tokens."""
    name, drawn = f"best-{schedule}", False
    with style(name):
        figure, axes = axes_of_a_figure(TOKENS, f"validation {LOSS}")
        for index, arm in enumerate(group["arms"]):
            cell = [r for r in runs if arm_of(r) == arm["arm"] and r["config"]["learning_rate"] == arm["best_lr"]]
            if not cell or any(record["results"].get("diverged") for record in cell):
                continue
            tokens, means = _validation(cell)
            late = tokens >= tokens.max(initial=0) / 2
            label = f"{arm['arm']} at {learning_rate(arm['best_lr'])}"
            axes.plot(tokens[late] / MILLION, means[late], label=label, **line(index, size=5))
            drawn = True
        if not drawn:
            return None
        legend(figure, axes)
        text = "Every variant at its own best learning rate: mean over seeds, second half of the tokens."
        return Figure(name, svg(figure), text)


def differences(group: dict[str, Any], schedule: str) -> Figure | None:
    """Differences from the first arm, with intervals that include the choice of the learning rate."""
    if not group["differences"]:
        return None
    first = group["differences"][0]["first"]
    entries = [
        (difference["second"], difference["difference"], difference["interval_with_choice"])
        for difference in group["differences"]
        if difference["first"] == first
    ]
    text = (
        f"Difference in final loss from {first}, each variant at its own best learning rate; left of the line is "
        "lower. 95 % intervals include the choice of the learning rate."
    )
    return _forest(f"differences-{schedule}", entries, f"loss less that of {short(first)}, nats per token", text)


def effects(group: dict[str, Any], schedule: str) -> Figure | None:
    """The factorial effects."""
    if not group["effects"]:
        return None
    entries = [(effect["effect"], effect["value"], effect["interval"]) for effect in group["effects"]]
    text = "Effect of each factor on the loss; left of the line it lowers the loss. 95 % intervals."
    return _forest(f"effects-{schedule}", entries, "change of the loss, nats per token", text)


def spikes(group: dict[str, Any], schedule: str) -> Figure | None:
    """Spike score of the gradient norm (or of the loss) against the learning rate; None if every score is 0."""
    kind = "grad_norm" if any("grad_norm" in cell["spikes"] for cell in group["cells"]) else "train_loss"
    cells = [cell for cell in group["cells"] if kind in cell["spikes"]]
    if not any(cell["spikes"][kind]["score"] > 0 for cell in cells) or len({c["lr"] for c in cells}) < 2:
        return None
    with style(f"spikes-{schedule}"):
        figure, axes = axes_of_a_figure("learning rate", "spike score, % of steps")
        for index, own in enumerate(_cells_by_arm(group, cells)):
            scores = [100 * cell["spikes"][kind]["score"] for cell in own]
            axes.plot([cell["lr"] for cell in own], scores, label=_names(group)[index], **line(index, size=5))
        learning_rate_axis(axes, (cell["lr"] for cell in cells))
        axes.set_ylim(bottom=0)
        legend(figure, axes)
        what = "gradient norm" if kind == "grad_norm" else "training loss"
        text = f"Share of steps whose {what} is seven or more standard deviations off. The table has the intervals."
        return Figure(f"spikes-{schedule}", svg(figure), text)


def predictions(group: dict[str, Any], schedule: str) -> Figure | None:
    """Final loss predicted from the first part of each run, against the actual one."""
    fits = [fit for fit in group["fits"] if fit["held"]["interval"]]
    if len(fits) < 2:
        return None
    with style(f"predictions-{schedule}"):
        figure, axes = axes_of_a_figure("actual final loss", "predicted final loss")
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
        legend(figure, axes)
        text = f"Final loss predicted from the first part of each run. On the dotted line it is exact. {INTERVALS}"
        return Figure(f"predictions-{schedule}", svg(figure), text)


def after_decay(groups: dict[str, Any], schedule: str) -> Figure | None:
    """Loss after decay against the loss at a constant learning rate, for every arm and learning rate with both."""
    if schedule == CONSTANT or not {schedule, CONSTANT} <= set(groups):
        return None
    before, after = (
        {(cell["arm"], cell["lr"]): cell for cell in groups[name]["cells"]} for name in (CONSTANT, schedule)
    )
    keys = sorted(key for key in after if key in before)
    top = HIGHEST * min(cell["loss"] for cell in before.values())
    keys = [key for key in keys if before[key]["loss"] <= top]
    if len(keys) < 2:
        return None
    with style(f"decay-{schedule}"):
        figure, axes = axes_of_a_figure("loss at a constant learning rate, nats per token", "loss after decay")
        for index, arm in enumerate(_names(groups[CONSTANT])):
            own = [key for key in keys if key[0] == arm]
            if own:
                bars = {"xerr": _bars([before[key] for key in own]), "yerr": _bars([after[key] for key in own])}
                look = line(index, size=5) | {"linestyle": "none", "elinewidth": 0.8}
                losses = ([group[key]["loss"] for key in own] for group in (before, after))
                axes.errorbar(*losses, **bars, label=arm, **look)
        legend(figure, axes)
        text = (
            f"Loss with and without decay over the same tokens, for variants and learning rates with both. {INTERVALS}"
        )
        return Figure(f"decay-{schedule}", svg(figure), text)


def _forest(
    name: str, entries: Sequence[tuple[str, float | int, Sequence[float | int]]], label: str, text: str
) -> Figure:
    """Values with their intervals, one below the other."""
    with style(name):
        figure, axes = axes_of_a_figure(label)
        figure.set_figheight(0.9 + 0.34 * len(entries))
        for index, (_, value, ends) in enumerate(entries):
            low, high = ends or (value, value)
            axes.plot([low, high], [index, index], color=COLOURS[0], linewidth=1.8)
            axes.plot([value], [index], **line(0, size=6))
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(entries)), [short(entry) for entry, _, _ in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        return Figure(name, svg(figure), text)


def _limits(runs: Sequence[Record]) -> tuple[float, float] | None:
    """Range of losses to show, from below the lowest to the highest after a tenth of the tokens, if there is one."""
    low, high = [], []
    for record in runs:
        tokens, losses = _validation([record])
        if len(losses):
            low.append(float(losses.min()))
            high.append(float(losses[np.searchsorted(tokens, 0.1 * tokens[-1])]))
    best = min(low, default=None)
    if best is None:
        return None
    lowest, highest = best - 0.05 * best, min(max(high), 1.6 * best)
    return (lowest, highest) if lowest < highest else None


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
    """The arm of a comparison that a run belongs to."""
    return str(record["config"].get("arm") or record["config"]["variant"])


def arms_of(runs: Iterable[Record]) -> list[str]:
    """The arms of runs, the baseline first."""
    return sorted(dict.fromkeys(arm_of(record) for record in runs), key=lambda arm: arm != BASELINE)


def _rates(runs: Iterable[Record]) -> list[float | int]:
    return sorted({run["config"]["learning_rate"] for run in runs})


def _names(group: dict[str, Any]) -> list[str]:
    return [arm["arm"] for arm in group["arms"]]


def _cells_by_arm(group: dict[str, Any], cells: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The cells of every arm in the order of learning rates."""
    return [sorted((c for c in cells if c["arm"] == arm), key=lambda cell: cell["lr"]) for arm in _names(group)]
