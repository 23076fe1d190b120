"""Pretraining runs and the fits made of them: one section for every model size and length of training."""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.formatting import ABSENT, learning_rate
from mea.report.parts import Figure, Part, Section, Table
from mea.report.sections import attention_diagnostics, recall
from mea.report.sections import pretraining_curves as curves
from mea.report.sections.scaling_fit import KIND as FIT
from mea.report.sections.scaling_fit import best_arms, fit_parts, schedule_suffix

RUN = "pretraining"
Shape = tuple[str, int]  # preset, and tokens of a run


def sections(records: Sequence[Record]) -> list[Section]:
    """One section for every model size and length of training; a fit goes with the runs that it was made of."""
    shapes = list(dict.fromkeys(_shape(record) for record in records))
    return [_section(shape, [record for record in records if _shape(record) == shape]) for shape in shapes]


def _shape(record: Record) -> Shape:
    config = record["config"]
    return str(config.get("preset", "")), int(config["tokens"])


def _section(shape: Shape, records: list[Record]) -> Section:
    runs = [record for record in records if record["kind"] == RUN]
    fits = [record for record in records if record["kind"] == FIT]
    fit = max(fits, key=lambda record: record["date"], default=None)
    preset, tokens = shape
    heading = f"Pretraining: {preset or 'a model'}, {tokens / 1e6:,.4g} million tokens"
    schedules = dict.fromkeys([_schedule(run) for run in runs] + list(_groups(fit)))
    parts = [Part(text=_stale(runs, fit))] if _stale(runs, fit) else []
    for schedule in schedules:
        suffix = schedule_suffix(schedule, schedules)
        chosen = [run for run in runs if _schedule(run) == schedule]
        group = _groups(fit).get(schedule)
        if group:
            parts.append(Part(numbers=_summary(group)))
        if accuracy := recall.part(chosen, suffix):
            parts.append(accuracy)
        if figures := _figures(chosen, fit, schedule):
            parts.append(Part(f"Learning rates, losses and stability in figures{suffix}", figures=figures))
        if figures := curves.of_arms(chosen, fit, schedule):
            text = "Thin lines: training loss. Markers: validation loss, mean over seeds."
            text += " Dashed lines: the fitted law." if fit else ""
            parts.append(Part(f"Loss against tokens for every variant{suffix}", text, figures=figures))
        if diagnostics := attention_diagnostics.part(chosen, suffix):
            parts.append(diagnostics)
    parts += fit_parts(fit) if fit else [_runs(runs)]
    return Section(heading, parts)


def _schedule(run: Record) -> str:
    return run["config"].get("schedule", "constant")


def _groups(fit: Record | None) -> dict[str, Any]:
    return fit["results"]["groups"] if fit else {}


def _figures(runs: list[Record], fit: Record | None, schedule: str) -> list[Figure]:
    drawn: list[Figure | None] = [curves.after_decay(_groups(fit), schedule)]
    if group := _groups(fit).get(schedule):
        drawn = [
            *curves.rate_against_loss(group, schedule),
            curves.at_best_rates(runs, group, schedule),
            curves.spikes(group, schedule),
            curves.predictions(group, schedule),
            curves.differences(group, schedule),
            curves.effects(group, schedule),
            *drawn,
        ]
    return [figure for figure in drawn if figure]


def _summary(group: dict[str, Any]) -> list[tuple[str, str]]:
    """The variant with the lowest loss, or the variants that tie for it; its loss; how good the predictions were."""
    best, *tied = best_arms(group)
    several = len({cell["lr"] for cell in group["cells"]}) > 1
    where = "each at its own best learning rate" if several else "at the one learning rate that was tried"
    numbers = []
    if tied:
        names = ", ".join(arm["arm"] for arm in (best, *tied))
        meaning = f"share the lowest loss ({names}: the 95 % intervals of their differences include 0), {where}"
        numbers.append((f"{1 + len(tied)} of {len(group['arms'])} variants", meaning))
    elif len(group["arms"]) > 1:
        numbers.append((best["arm"], f"lowest loss among the variants, {where}"))
    at = f"at a learning rate of {learning_rate(best['best_lr'])}"
    whose = f"validation loss of {best['arm']} in nats per token" if tied else "its validation loss in nats per token"
    numbers.append((f"{best['loss']:.3f}", f"{whose}, {at}"))
    if group["fits"]:
        ends = [fit["held"]["error_interval"] for fit in group["fits"]]
        covered = sum(bool(end) and end[0] <= 0 <= end[1] for end in ends)
        numbers.append((f"{covered} of {len(ends)}", "final losses within the interval predicted from the first part"))
    return numbers


def _stale(runs: list[Record], fit: Record | None) -> str:
    """A warning if the fit was made of other runs than the ones that are shown."""
    if fit is None or not runs or fit["config"]["runs"] == len(runs):
        return ""
    return (
        f"The fit was made of {fit['config']['runs']} runs, but {len(runs)} are here: its tables do not describe these "
        "runs. Run mea fit again."
    )


def _runs(runs: list[Record]) -> Part:
    """A table of runs without a fit."""
    lines = []
    for record in runs:
        config, results = record["config"], record["results"]
        loss = results.get("validation_loss")
        line = [
            str(config.get("arm") or config["variant"]),
            learning_rate(config["learning_rate"]),
            str(config.get("seed", 0)),
        ]
        lines.append([*line, ABSENT if loss is None else f"{loss:z.4f}", "yes" if results.get("diverged") else "no"])
    note = "Final validation loss in nats per token. mea fit adds fits, intervals and comparisons of these records."
    return Part("Runs", table=Table(["variant", "learning rate", "seed", "loss", "diverged"], lines, note))
