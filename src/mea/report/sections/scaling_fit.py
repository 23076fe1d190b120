"""A record of the kind ``"fit"`` as tables: rates, losses, stability, fits, differences, and whether the fit predicts.

`mea.scaling.fit_records` makes such records and says what is in them.
"""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.parts import ABSENT, Part, Table, with_interval

KIND = "fit"
RULES = {
    "far": "lowest predicted loss, whole run",
    "held": "lowest predicted loss, first part of the run",
    "early": "lowest loss where that part ends",
    "paper": "largest rate without a spike (the paper's rule)",
}
DECAY_RULES = {"constant": "lowest loss at the end, constant rate"} | RULES


def fit_parts(record: Record) -> list[Part]:
    """One part with a table for every question that the record answers, schedule after schedule.

    Raises
    ------
    ValueError
        The record is of another kind.
    """
    if record["kind"] != KIND:
        raise ValueError(f"a record of the kind {record['kind']!r} holds no fits")
    parts: list[Part] = []
    groups = record["results"]["groups"]
    for schedule, group in groups.items():
        suffix = f" ({schedule} rate)" if len(groups) > 1 else ""
        config = record["config"]
        for make in (_arms, _differences, _effects, _cells, _sensitivity, _fits, _prediction, _rules):
            part = make(group, config)
            if part is not None:
                parts.append(Part(part.heading + suffix, table=part.table))
    return parts + _after_decay(record["results"].get("after_decay", []))


def rate(value: float | None) -> str:
    """A learning rate: ``0.0063``."""
    return ABSENT if value is None else f"{value:.3g}"


def _arms(group: dict[str, Any], config: dict[str, Any]) -> Part:
    header = ["variant", "best rate", "loss there", "sure of the rate", "paper's rule", "loss there", "predicted best"]
    lines = []
    for arm in group["arms"]:
        alone = _rates_tried(group, arm["arm"]) == 1
        edge = " (only one)" if alone else "" if arm["best_inside"] else " (edge)"
        line = [arm["arm"], rate(arm["best_rate"]) + edge, with_interval(arm["loss"], arm["interval"])]
        line += [
            ABSENT if alone else f"{100 * arm['probability_best']:.0f} %",
            _chosen(arm["paper_rate"], arm["rules"].get("paper")),
        ]
        line += [with_interval(arm["paper_loss"], None), _chosen(arm["predicted_rate"], arm["rules"].get("far"))]
        lines.append(line)
    best = min(range(len(lines)), key=lambda i: group["arms"][i]["loss"])
    note = f"{_noise_note(group)} Predicted: at {config['horizon']:g} times the tokens."
    note += " (edge): none beyond was tried." if any(" (edge)" in line[1] for line in lines) else ""
    note += " (only one): no other rate was tried, so that nothing is said of rates." if _any_alone(group) else ""
    return Part("Rates", table=Table(header, lines, note, best=(best,)))


def _sensitivity(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    arms = [arm for arm in group["arms"] if "sensitivity" in arm]
    if not arms:
        return None
    lines = [[arm["arm"], with_interval(arm["sensitivity"], arm["sensitivity_interval"])] for arm in arms]
    low, high = arms[0]["sensitivity_rates"]
    note = f"Mean excess loss over rates from {rate(low)} to {rate(high)}, as in arXiv 2309.14322, in nats per token."
    best = min(range(len(lines)), key=lambda i: arms[i]["sensitivity"])
    return Part("Sensitivity to the rate", table=Table(["variant", "sensitivity"], lines, note, best=(best,)))


def _differences(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["differences"]:
        return None
    header = ["first", "second", "second - first", "with choice of rate", "second is lower", "pairs"]
    lines = [
        [
            d["first"],
            d["second"],
            with_interval(d["difference"], d["interval"], 4, "+"),
            _only_interval(d["interval_with_choice"]),
            f"{100 * d['probability_lower']:.0f} %",
            str(d["pairs"]),
        ]
        for d in group["differences"]
    ]
    note = (
        "Final validation loss in nats per token, each variant at its own best rate. The second interval also counts "
        "that another rate might be the best."
    )
    if group["seed_noise"] is None:
        note += " With one seed, intervals and shares tell of the validation text only."
    if _any_alone(group):
        note += " Of some variants one rate is all that was tried: it is no best rate of theirs."
    return Part("Differences between variants", table=Table(header, lines, note, texts=2))


def _effects(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["effects"]:
        return None
    lines = [[e["effect"], with_interval(e["value"], e["interval"], 4, "+")] for e in group["effects"]]
    note = "Loss with less loss without, averaged over the other factors; every arm at its own best rate."
    return Part("Effects of mixing and norm", table=Table(["effect", "nats per token"], lines, note))


def _cells(group: dict[str, Any], config: dict[str, Any]) -> Part:
    header = ["variant", "rate", "final loss", "seeds", "diverged", "with spike", "spike score", "gradient norm's"]
    lines = []
    for cell in group["cells"]:
        seeds = len(cell["seeds"])
        line = [cell["arm"], rate(cell["rate"]), with_interval(cell["loss"], cell["interval"]), str(seeds)]
        line += [str(cell[name]) for name in ("diverged", "spiked")]
        for name in ("train_loss", "grad_norm"):
            score = cell["spikes"].get(name)
            line.append(_percent(score["score"], score["interval"]) if score else ABSENT)
        lines.append(line)
    best = {arm["arm"]: arm["best_rate"] for arm in group["arms"]}
    rows = tuple(i for i, cell in enumerate(group["cells"]) if best[cell["arm"]] == cell["rate"])
    note = (
        "Spike score (arXiv 2501.00656): share of steps seven or more standard deviations from the rolling mean, in "
        "the training loss and in the gradient norm. A diverged run counts with its loss before training."
    )
    return Part("Losses and stability", table=Table(header, lines, note, best=rows))


def _fits(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["fits"]:
        return None
    header = ["variant", "rate", "α", "D_c", "L_0", "residual", "predicted loss"]
    lines = []
    for fit in group["fits"]:
        constants = [
            with_interval(fit[name]["value"], fit[name]["interval"], digits)
            for name, digits in (("exponent", 2), ("scale", -2), ("floor", 2))
        ]
        edge = " *" if fit["exponent_at_edge"] or fit["replicates_at_edge"] > 0.05 else ""
        line = [fit["arm"], rate(fit["rate"]), constants[0] + edge, *constants[1:], f"{100 * fit['residual']:.2f} %"]
        lines.append([*line, with_interval(fit["horizon"]["predicted"], fit["horizon"]["interval"], 2)])
    horizon = group["fits"][0]["horizon"]["tokens"]
    note = (
        f"L(D) = (D_c / D)^α + L_0, {config['draws']:,} bootstrap replicates; predicted: at {horizon:,.0f} tokens. "
        "*: more than 5 % of the replicates end at the limits of α: the curve does not determine it."
    )
    return Part("Fits of loss against tokens", table=Table(header, lines, note))


def _prediction(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["fits"]:
        return None
    lines = []
    for line in group["prediction"]:
        cells = [line["arm"], str(line["cells"])]
        cells += [with_interval(line[n]["correlation"], line[n]["interval"], 2) for n in ("held", "early")]
        cells += [f"{100 * line['mean_error']:+.2f} %", f"{100 * line['largest_error']:.2f} %"]
        lines.append([*cells, f"{line['covered']} of {line['cells']}"])
    header = ["variant", "rates", "ranks by fit", "ranks by loss so far", "mean error"]
    header += ["largest error", "interval holds the truth"]
    if not lines:  # fewer than three rates of every arm: no ranks, but errors
        header = ["variant", "rate", "predicted", "actual", "error"]
        for fit in group["fits"]:
            held = fit["held"]
            cells = [with_interval(held["predicted"], held["interval"]), f"{held['actual']:.3f}"]
            error = _percent(held["error"], held["error_interval"], "+")
            lines.append([fit["arm"], rate(fit["rate"]), *cells, error])
    share = f"{100 * config['held']:g} %"
    note = (
        f"Fitted on the first {share} of the tokens, predicting the loss at the end of the same runs. Rank "
        "correlations are of rates (and variants, in the last line) by predicted and by actual loss, beside those by "
        "the loss where the first part ends."
    )
    return Part("Does the fit predict?", table=Table(header, lines, note))


def _rules(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    arms = [arm for arm in group["arms"] if _rates_tried(group, arm["arm"]) > 1]
    names = [name for name in RULES if any(name in arm["rules"] for arm in arms)]
    if not names:
        return None
    lines = []
    for arm in arms:
        for name in (name for name in names if name in arm["rules"]):
            rule = arm["rules"][name]
            line = [arm["arm"], RULES[name], f"{100 * rule['probability']:.0f} %", f"{rule['regret']:.4f}"]
            lines.append(line)
    note = (
        "How often a rule takes the rate that is best at the end of the runs, over bootstrap replicates of both, and "
        "what it loses on average against the best rate by the losses measured, in nats per token."
    )
    header = ["variant", "rule", "takes the best rate", "expected loss"]
    return Part("Which rule finds the best rate?", table=Table(header, lines, note, texts=2))


def _after_decay(found: Sequence[dict[str, Any]]) -> list[Part]:
    if not found:
        return []
    header = ["variant", "schedule", "cells", "rank correlation", "best at constant rate", "best after decay", "gain"]
    lines, choices = [], []
    for line in found:
        together = line["arm"] == "all arms"
        best = [
            f"{line[f'best_{when}_arm']} at {rate(line[f'best_{when}'])}" if together else rate(line[f"best_{when}"])
            for when in ("constant", "decayed")
        ]
        correlation = with_interval(line["correlation"], line["interval"], 2)
        lines.append(
            [line["arm"], line["schedule"], str(len(line["rates"])), correlation, *best, f"{line['gain']:.3f}"]
        )
        for name, text in DECAY_RULES.items():
            if rule := line["rules"].get(name):
                choice = [line["arm"], text, f"{100 * rule['probability']:.0f} %", f"{rule['regret']:.4f}"]
                choices.append(choice)
    note = (
        "Arms at rates ranked by the loss at a constant rate and by the loss after decay, both over all tokens; gain: "
        "what decay lowers the loss by on average, in nats per token."
    )
    made = [Part("Does the choice at a constant rate hold after decay?", table=Table(header, lines, note, texts=2))]
    note = (
        "How often the choice, made on the runs at a constant rate, is the best after decay, over bootstrap replicates "
        "of both, and what it loses on average against the best by the losses measured, in nats per token."
    )
    header = ["variant", "chosen by", "takes the best", "expected loss"]
    made.append(Part("Which choice is the best after decay?", table=Table(header, choices, note, texts=2)))
    return made


def _rates_tried(group: dict[str, Any], arm: str) -> int:
    return sum(cell["arm"] == arm for cell in group["cells"])


def _any_alone(group: dict[str, Any]) -> bool:
    return any(_rates_tried(group, arm["arm"]) == 1 for arm in group["arms"])


def _chosen(value: float | None, rule: dict[str, Any] | None) -> str:
    """A rate and the range of rates that the rule takes in the replicates."""
    span = (rule or {}).get("rates")
    if value is None or not span or span[0] == span[1] == value:
        return rate(value)
    return f"{rate(value)} ({rate(span[0])} to {rate(span[1])})"


def _percent(value: float, interval: Sequence[float], sign: str = "") -> str:
    return with_interval(100 * value, [100 * x for x in interval], 2, sign, " %")


def _only_interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else ABSENT


def _noise_note(group: dict[str, Any]) -> str:
    noise = group["seed_noise"]
    if noise is None:
        return (
            "Loss in nats per token; ranges: 95 % intervals. Every run has one seed: the intervals tell of the "
            "validation text and of the scatter along a run, not of what another seed would change."
        )
    freedom = f"{noise['freedom']} degree{'s' * (noise['freedom'] != 1)} of freedom"
    return (
        "Loss in nats per token; ranges: 95 % intervals over seeds and blocks. Standard deviation between seeds: "
        f"{100 * noise['deviation']:.2f} % of the loss ({freedom}), which stands in where there is one seed only."
    )
