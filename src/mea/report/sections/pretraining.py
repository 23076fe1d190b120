"""Pretraining: loss curves and fits of every variant, rates against loss, stability, differences, and the tables."""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.parts import ABSENT, Figure, Part, Section, Table
from mea.report.sections import attention_diagnostics
from mea.report.sections import pretraining_curves as curves
from mea.report.sections.scaling_fit import KIND as FIT
from mea.report.sections.scaling_fit import fit_parts, rate

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
    schedules = dict.fromkeys([r["config"].get("schedule", "constant") for r in runs] + list(_groups(fit)))
    parts = [Part(text=_stale(runs, fit))] if _stale(runs, fit) else []
    for schedule in schedules:
        suffix = f" ({schedule} rate)" if len(schedules) > 1 else ""
        chosen = [record for record in runs if record["config"].get("schedule", "constant") == schedule]
        group = _groups(fit).get(schedule)
        if group:
            parts.append(Part(numbers=_summary(group)))
        if drawn := _figures(chosen, fit, schedule):
            parts.append(Part(f"Rates, losses and stability in figures{suffix}", figures=drawn))
        if drawn := curves.of_arms(chosen, fit, schedule):
            text = "Thin: training loss. Markers: validation loss, mean over seeds."
            text += " Dashed: the fitted law." if fit else ""
            parts.append(Part(f"Loss against tokens, variant by variant{suffix}", text, figures=drawn))
        if seen := attention_diagnostics.part(chosen, suffix):
            parts.append(seen)
    parts += fit_parts(fit) if fit else [_runs(runs)]
    return Section(heading, parts)


def _groups(fit: Record | None) -> dict[str, Any]:
    return fit["results"]["groups"] if fit else {}


def _figures(runs: list[Record], fit: Record | None, schedule: str) -> list[Figure]:
    group = _groups(fit).get(schedule)
    drawn: list[Figure | None] = [*curves.rate_against_loss(group, schedule)] if group else []
    drawn.append(curves.at_best_rates(runs, group, schedule) if group and runs else None)
    drawn += [curves.spikes(group, schedule), curves.predictions(group, schedule)] if group else []
    drawn += [curves.differences(group, schedule), curves.effects(group, schedule)] if group else []
    drawn.append(curves.after_decay(_groups(fit), schedule))
    return [figure for figure in drawn if figure]


def _summary(group: dict[str, Any]) -> list[tuple[str, str]]:
    best = min(group["arms"], key=lambda arm: arm["loss"])
    several = len({cell["rate"] for cell in group["cells"]}) > 1
    where = "each at its own best rate" if several else "at the one rate that was tried"
    numbers = [(best["arm"], f"lowest loss among the variants, {where}")] if len(group["arms"]) > 1 else []
    numbers += [
        (f"{best['loss']:.3f}", f"its validation loss in nats per token, at a rate of {rate(best['best_rate'])}")
    ]
    if group["fits"]:
        held = sum(f["held"]["error_interval"][0] <= 0 <= f["held"]["error_interval"][1] for f in group["fits"])
        numbers.append((f"{held} of {len(group['fits'])}", "losses at the end within the interval predicted before"))
    return numbers


def _stale(runs: list[Record], fit: Record | None) -> str:
    """A warning if the fit was made of other runs than the ones that are shown."""
    if fit is None or not runs or fit["config"]["runs"] == len(runs):
        return ""
    return (
        f"The fit was made of {fit['config']['runs']} runs, but {len(runs)} are here: its tables are not those of "
        "these runs. Make it anew with mea fit."
    )


def _runs(runs: list[Record]) -> Part:
    """What there is to say of runs without a fit."""
    lines = []
    for record in runs:
        config, results = record["config"], record["results"]
        loss = results.get("validation_loss")
        line = [str(config.get("arm") or config["variant"]), rate(config["learning_rate"]), str(config.get("seed", 0))]
        lines.append([*line, ABSENT if loss is None else f"{loss:.4f}", "yes" if results.get("diverged") else "no"])
    note = "Validation loss at the end, nats per token. mea fit makes fits, intervals and comparisons of these records."
    return Part("Runs", table=Table(["variant", "rate", "seed", "loss", "diverged"], lines, note))
