"""A record of the kind ``"fit"`` as tables: learning rates, losses, stability, fits, differences, predictions.

`mea.scaling.fit_records` makes such records and says what is in them.
"""

from collections.abc import Collection, Sequence
from typing import Any

from mea.records import Record
from mea.report.formatting import ABSENT, learning_rate, with_interval
from mea.report.parts import Part, Table

KIND = "fit"
RULES = {
    "far": "lowest predicted loss, whole run",
    "held": "lowest predicted loss, first part of the run",
    "early": "lowest loss at the end of the first part",
    "paper": "largest learning rate without a spike (the paper's rule)",
}
HOLDS = "Does the choice at a constant learning rate hold after decay?"
DECAY_RULES = {"constant": "lowest final loss, constant learning rate"} | RULES


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
        suffix, config = schedule_suffix(schedule, groups), record["config"]
        for make in (_arms, _differences, _effects, _cells, _sensitivity, _fits, _prediction, _rules):
            part = make(group, config)
            if part is not None:
                parts.append(Part(part.heading + suffix, table=part.table))
    return parts + _after_decay(record["results"].get("after_decay", []))


def schedule_suffix(schedule: str, schedules: Collection[str]) -> str:
    """What headings add where there are several schedules of the learning rate."""
    return f" ({schedule} schedule)" if len(schedules) > 1 else ""


def best_arms(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The arm with the lowest loss, then those whose difference from it has an interval that includes 0."""
    best = min(group["arms"], key=lambda arm: arm["loss"])
    tied = set()
    for difference in group["differences"]:
        ends = difference["interval_with_choice"] or difference["interval"]
        if ends and ends[0] <= 0 <= ends[1]:
            tied |= {difference["first"], difference["second"]} if best["arm"] in difference.values() else set()
    return [best, *(arm for arm in group["arms"] if arm is not best and arm["arm"] in tied)]


def _arms(group: dict[str, Any], config: dict[str, Any]) -> Part:
    header = ["variant", "best learning rate", "loss there", "best in replicates"]
    header += ["paper's rule", "loss there", "predicted best"]
    lines = []
    for arm in group["arms"]:
        alone = _rates_tried(group, arm["arm"]) == 1
        edge = " (only one)" if alone else "" if arm["best_inside"] else " (edge)"
        lines.append([
            arm["arm"],
            learning_rate(arm["best_lr"]) + edge,
            with_interval(arm["loss"], arm["interval"]),
            ABSENT if alone else f"{100 * arm['probability_best']:.0f} %",
            _chosen(arm["paper_lr"], arm["rules"].get("paper")),
            with_interval(arm["paper_loss"], None),
            _chosen(arm["predicted_lr"], arm["rules"].get("far")),
        ])  # fmt: skip
    best = best_arms(group)
    note = f"{_noise_note(group)} Best in replicates: share of bootstrap replicates where its loss is lowest."
    note += f" Predicted: at {config['horizon']:g} times the tokens."
    note += " (edge): no learning rate beyond it was tried." if any(" (edge)" in line[1] for line in lines) else ""
    note += " (only one): no other learning rate was tried, so nothing follows about it." if _any_alone(group) else ""
    highlighted = tuple(index for index, arm in enumerate(group["arms"]) if arm in best)
    return Part("Learning rates", table=Table(header, lines, note, best=highlighted))


def _sensitivity(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    arms = [arm for arm in group["arms"] if arm.get("sensitivity_lrs")]
    if not arms:
        return None
    lines = [[arm["arm"], with_interval(arm["sensitivity"], arm["sensitivity_interval"])] for arm in arms]
    low, high = arms[0]["sensitivity_lrs"]
    note = (
        f"Mean excess loss over learning rates from {learning_rate(low)} to {learning_rate(high)} in nats per token, "
        "as in arXiv 2309.14322."
    )
    best = min(arms, key=lambda arm: arm["sensitivity"])
    highest = max(best["sensitivity"], *best["sensitivity_interval"])
    # A lower end within the best's interval is a tie.
    tied = (i for i, arm in enumerate(arms) if min(arm["sensitivity"], *arm["sensitivity_interval"]) <= highest)
    table = Table(["variant", "sensitivity"], lines, note, best=tuple(tied))
    return Part("Sensitivity to the learning rate", table=table)


def _differences(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["differences"]:
        return None
    header = ["first", "second", "second - first", "with choice of learning rate", "second is lower", "pairs"]
    lines = []
    for pair in group["differences"]:
        line = [pair["first"], pair["second"], with_interval(pair["difference"], pair["interval"], 4, "+")]
        line += [_only_interval(pair["interval_with_choice"]), f"{100 * pair['probability_lower']:.0f} %"]
        lines.append([*line, str(pair["pairs"])])
    note = (
        "Final validation loss in nats per token, each variant at its own best learning rate. The second interval "
        "includes the uncertainty about which learning rate is the best."
    )
    if group["seed_noise"] is None:
        note += " With one seed, intervals and shares cover the validation text only."
    if _any_alone(group):
        note += " Some variants were run at one learning rate only, which need not be their best."
    return Part("Differences between variants", table=Table(header, lines, note, texts=2))


def _effects(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["effects"]:
        return None
    lines = [[e["effect"], with_interval(e["value"], e["interval"], 4, "+")] for e in group["effects"]]
    note = "Loss with the factor less loss without it, averaged over the other factors; best learning rate of each arm."
    return Part("Effects of mixing and norm", table=Table(["effect", "nats per token"], lines, note))


def _cells(group: dict[str, Any], config: dict[str, Any]) -> Part:
    header = ["variant", "learning rate", "final loss", "seeds", "diverged", "with spike", "spike score, loss"]
    header.append("spike score, gradient norm")
    lines = []
    for cell in group["cells"]:
        seeds = len(cell["seeds"])
        line = [cell["arm"], learning_rate(cell["lr"]), with_interval(cell["loss"], cell["interval"]), str(seeds)]
        line += [str(cell[name]) for name in ("diverged", "spiked")]
        for name in ("train_loss", "grad_norm"):
            score = cell["spikes"].get(name)
            line.append(_percent(score["score"], score["interval"]) if score else ABSENT)
        lines.append(line)
    best = {arm["arm"]: arm["best_lr"] for arm in group["arms"]}
    rows = tuple(i for i, cell in enumerate(group["cells"]) if best.get(cell["arm"]) == cell["lr"])
    note = (
        "Spike score (arXiv 2501.00656): share of steps seven or more standard deviations from the rolling mean, in "
        "the training loss and in the gradient norm. A diverged run counts with its loss before training."
    )
    return Part("Losses and stability", table=Table(header, lines, note, best=rows))


def _fits(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["fits"]:
        return None
    header = ["variant", "learning rate", "α", "D_c", "L_0", "residual", "predicted loss"]
    lines = []
    for fit in group["fits"]:
        constants = [
            with_interval(fit[name]["value"], fit[name]["interval"], digits)
            for name, digits in (("exponent", 2), ("scale", -2), ("floor", 2))
        ]
        edge = " *" if fit["exponent_at_edge"] or fit["replicates_at_edge"] > 0.05 else ""
        line = [
            fit["arm"],
            learning_rate(fit["lr"]),
            constants[0] + edge,
            *constants[1:],
            f"{100 * fit['residual']:.2f} %",
        ]
        lines.append([*line, with_interval(fit["horizon"]["predicted"], fit["horizon"]["interval"], 2)])
    horizon = group["fits"][0]["horizon"]["tokens"]
    note = (
        f"L(D) = (D_c / D)^α + L_0, {config['draws']:,} bootstrap replicates; predicted: at {horizon:,.0f} tokens. "
        "*: more than 5 % of the replicates end at the limits of α, which the curve does not determine."
    )
    return Part("Fits of loss against tokens", table=Table(header, lines, note))


def _prediction(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    if not group["fits"]:
        return None
    lines = []
    for line in group["prediction"]:
        cells = [line["arm"], str(line["cells"])]
        cells += [with_interval(line[n]["correlation"], line[n]["interval"], 2) for n in ("held", "early")]
        cells += [f"{100 * line['mean_error']:+z.2f} %", f"{100 * line['largest_error']:.2f} %"]
        lines.append([*cells, f"{line['covered']} of {line['cells']}"])
    header = ["variant", "learning rates", "rank correlation, fit", "rank correlation, loss so far", "mean error"]
    header += ["largest error", "actual loss in interval"]
    if not lines:  # fewer than three rates of every arm: no ranks, but errors
        header = ["variant", "learning rate", "predicted", "actual", "error"]
        for fit in group["fits"]:
            held = fit["held"]
            cells = [with_interval(held["predicted"], held["interval"]), f"{held['actual']:.3f}"]
            error = _percent(held["error"], held["error_interval"], "+")
            lines.append([fit["arm"], learning_rate(fit["lr"]), *cells, error])
    share = f"{100 * config['held']:g} %"
    note = (
        f"Fitted on the first {share} of the tokens to predict the final loss of the same runs. Rank correlations "
        "compare the order of learning rates (and of variants, in the last line) by actual final loss with their order "
        "by predicted loss and by the loss at the end of the first part."
    )
    return Part("Does the fit predict?", table=Table(header, lines, note))


def _rules(group: dict[str, Any], config: dict[str, Any]) -> Part | None:
    arms = [arm for arm in group["arms"] if _rates_tried(group, arm["arm"]) > 1]
    lines = [line for arm in arms for line in _judged(arm["arm"], arm["rules"], RULES)]
    if not lines:
        return None
    note = (
        "Share of bootstrap replicates in which a rule takes the learning rate with the lowest final loss, and the "
        "mean loss above that of the best learning rate, in nats per token."
    )
    header = ["variant", "rule", "takes the best", "expected loss"]
    return Part("Which rule finds the best learning rate?", table=Table(header, lines, note, texts=2))


def _after_decay(comparisons: Sequence[dict[str, Any]]) -> list[Part]:
    if not comparisons:
        return []
    header = ["variant", "schedule", "runs", "rank correlation", "best at constant learning rate", "best after decay"]
    header.append("gain")
    lines, choices = [], []
    for line in comparisons:
        best = [learning_rate(line[f"best_{when}"]) for when in ("constant", "decayed")]
        if line["arm"] == "all arms":
            best = [f"{line['best_constant_arm']} at {best[0]}", f"{line['best_decayed_arm']} at {best[1]}"]
        correlation = with_interval(line["correlation"], line["interval"], 2)
        cells = [line["arm"], line["schedule"], str(len(line["lrs"])), correlation]
        lines.append([*cells, *best, f"{line['gain']:z.3f}"])
        choices += _judged(line["arm"], line["rules"], DECAY_RULES)
    note = (
        "Rank correlation of variants and learning rates by their loss at a constant learning rate and after decay, "
        "both over all tokens. Gain: mean reduction of the loss by decay, in nats per token."
    )
    made = [Part(HOLDS, table=Table(header, lines, note, texts=2))]
    note = (
        "Share of bootstrap replicates in which a choice made at a constant learning rate is the best after decay, and "
        "its mean loss above that of the best, in nats per token."
    )
    header = ["variant", "chosen by", "takes the best", "expected loss"]
    made.append(Part("Which choice is the best after decay?", table=Table(header, choices, note, texts=2)))
    return made


def _judged(arm: str, rules: dict[str, Any], texts: dict[str, str]) -> list[list[str]]:
    """A line for every rule: how often it takes the best, and its mean loss above that of the best."""
    judged = [(text, rules[name]) for name, text in texts.items() if name in rules]
    return [[arm, text, f"{100 * rule['probability']:.0f} %", f"{rule['regret']:z.4f}"] for text, rule in judged]


def _rates_tried(group: dict[str, Any], arm: str) -> int:
    return sum(cell["arm"] == arm for cell in group["cells"])


def _any_alone(group: dict[str, Any]) -> bool:
    return any(_rates_tried(group, arm["arm"]) == 1 for arm in group["arms"])


def _chosen(value: float | int | None, rule: dict[str, Any] | None) -> str:
    """A learning rate and the range of those that the rule takes in the replicates."""
    span = (rule or {}).get("lrs")
    if value is None or not span or span[0] == span[1] == value:
        return learning_rate(value)
    return f"{learning_rate(value)} ({learning_rate(span[0])} to {learning_rate(span[1])})"


def _percent(value: float | int, interval: Sequence[float | int], sign: str = "") -> str:
    return with_interval(100 * value, [100 * x for x in interval], 2, sign, " %")


def _only_interval(interval: Sequence[float | int]) -> str:
    return f"{interval[0]:+z.4f} to {interval[1]:+z.4f}" if interval else ABSENT


def _noise_note(group: dict[str, Any]) -> str:
    noise = group["seed_noise"]
    if noise is None:
        return (
            "Loss in nats per token; ranges: 95 % intervals. Every run has one seed: the intervals cover the "
            "validation text and the scatter along a run, not the difference between seeds."
        )
    freedom = f"{noise['freedom']} degree{'s' * (noise['freedom'] != 1)} of freedom"
    return (
        "Loss in nats per token; ranges: 95 % intervals over seeds and blocks. Standard deviation between seeds: "
        f"{100 * noise['deviation']:.2f} % of the loss ({freedom}), which is used where there is one seed only."
    )
