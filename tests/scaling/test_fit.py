"""From records to the record of a fit: known constants, choices, differences, and how often intervals hold them."""

import numpy as np
import pytest

import synthetic_runs
from mea.records import Record, write_record
from mea.scaling import FitSettings, fit_records
from mea.scaling.bootstrap import Draws, pooled_noise
from mea.scaling.learning_rate import rank_correlation, sensitivity
from mea.scaling.runs import cells_of, read_runs

QUICK = FitSettings(draws=400)


@pytest.fixture(scope="module")
def known() -> Record:
    """The fit of two arms at four learning rates."""
    return fit_records(synthetic_runs.sweep(), QUICK)


def test_a_sweep_with_known_answers(known, tmp_path):
    record = known
    write_record(tmp_path / "fit.json", record)  # every value is JSON
    group = record["results"]["groups"]["constant"]
    a, b = group["arms"]
    assert (a["best_lr"], b["best_lr"]) == (3e-3, 1e-2)
    assert a["best_inside"]
    assert b["best_inside"]
    assert (a["paper_lr"], b["paper_lr"]) == (3e-3, 1e-2)
    assert a["probability_best"] > 0.95
    (difference,) = group["differences"]
    low, high = difference["interval"]
    assert low < -0.05 < high < 0
    assert difference["pairs"] == 3
    fit = next(f for f in group["fits"] if (f["arm"], f["lr"]) == ("a", 3e-3))
    for name, truth in (("exponent", 0.4), ("scale", 1e6), ("floor", 2.0)):
        low, high = fit[name]["interval"]
        assert low < truth < high
    assert fit["held"]["actual"] == pytest.approx(fit["held"]["predicted"], rel=0.02)
    assert all(line["held"]["correlation"] > 0.7 for line in group["prediction"])


def test_a_diverged_rate_is_not_fitted_but_counts_in_the_sensitivity(known):
    group = known["results"]["groups"]["constant"]
    assert ("a", 3e-2) not in [(fit["arm"], fit["lr"]) for fit in group["fits"]]
    cell = next(c for c in group["cells"] if (c["arm"], c["lr"]) == ("a", 3e-2))
    assert (cell["diverged"], cell["loss"]) == (3, pytest.approx(7.6))
    a, b = group["arms"]
    assert a["sensitivity"] > b["sensitivity"] > 0


def test_intervals_hold_the_truth_as_often_as_they_say(run):
    """95 % intervals over 3 seeds, in 40 repetitions: fewer than 33 hits has a probability below 0.1 %."""
    hits = {"exponent": 0, "floor": 0, "difference": 0}
    for key in range(40):
        records = [run(arm, 3e-3, seed, key=key, shift=s) for arm, s in (("a", 0.0), ("b", -0.01)) for seed in range(3)]
        group = fit_records(records, FitSettings(draws=300, seed=key))["results"]["groups"]["constant"]
        for name, truth in (("exponent", 0.4), ("floor", 2.0)):
            low, high = group["fits"][0][name]["interval"]
            hits[name] += low <= truth <= high
        low, high = group["differences"][0]["interval"]
        hits["difference"] += low <= -0.01 <= high
    assert all(count >= 33 for count in hits.values()), hits


def test_pairs_cancel_what_seeds_share(run):
    """Without pairing, the difference would carry the noise of the seeds twice."""
    cells = cells_of(read_runs([run(arm, 1e-3, seed, noise=0.01) for arm in "ab" for seed in range(4)]))
    first, second = (Draws(2000).finals(cell, None) for cell in cells)
    assert (second - first).std() < 0.7 * first.std()


def test_one_seed_takes_the_pooled_noise(run):
    records = [run("a", 1e-3, seed, noise=0.01) for seed in range(4)] + [run("a", 2e-3, 0)]
    cells = cells_of(read_runs(records))
    noise = pooled_noise(cells)
    assert noise is not None
    assert noise.freedom == 3
    replicates = np.log(Draws(4000).finals(cells[1], noise))
    low, high = np.percentile(replicates - np.log(cells[1].finals[0]), [2.5, 97.5]) / noise.deviation
    assert (low, high) == (pytest.approx(-3.18, abs=0.25), pytest.approx(3.18, abs=0.25))  # t of 3 degrees of freedom


def test_spread_over_seeds_is_that_of_students_t(run):
    cells = cells_of(read_runs([run("a", 1e-3, seed, noise=0.01) for seed in range(3)]))
    logs = np.log(cells[0].finals)
    replicates = (np.log(Draws(20_000).finals(cells[0], None)) - logs.mean()) / (logs.std(ddof=1) / np.sqrt(3))
    assert np.percentile(np.abs(replicates), 95) == pytest.approx(4.303, rel=0.06)


def test_one_seed_each_says_nothing_of_what_two_arms_share(run):
    """The pooled noise once cancelled between them, as if another seed would move both alike."""
    records = [run("a", 1e-3, seed, noise=0.01) for seed in range(3)]
    records += [run(arm, 1e-3, 0, noise=0.01) for arm in ("b", "c")]
    group = fit_records(records, QUICK)["results"]["groups"]["constant"]
    loss = group["cells"][0]["loss"]
    (found,) = (d for d in group["differences"] if (d["first"], d["second"]) == ("b", "c"))
    low, high = found["interval"]
    assert high - low > 2 * 1.96 * np.sqrt(2) * 0.9 * group["seed_noise"]["deviation"] * loss


def test_more_rates_to_choose_from_make_no_arm_better(run):
    """Three rates that are alike: the least of three replicates once put their arm ahead of one with a single rate."""
    records = [run("a", 1e-3, seed, noise=0.01) for seed in range(3)]
    records += [run("b", rate, seed, noise=0.01) for rate in (1e-3, 2e-3, 3e-3) for seed in range(3)]
    (found,) = fit_records(records, FitSettings(draws=2000))["results"]["groups"]["constant"]["differences"]
    fixed, chosen = (np.mean(found[name]) for name in ("interval", "interval_with_choice"))
    assert chosen > fixed - 0.1 * np.ptp(found["interval"])
    assert np.ptp(found["interval_with_choice"]) > 0.9 * np.ptp(found["interval"])


def test_two_seeds_far_apart_are_fitted(run):
    """Their replicates overflowed, and the fit of everything stopped at losses that are not finite."""
    records = [run("a", 1e-3, seed, shift=1.5 * seed) for seed in range(2)]
    (cell,) = fit_records(records, FitSettings(draws=4000))["results"]["groups"]["constant"]["cells"]
    assert np.isfinite(cell["interval"]).all()


def test_the_baseline_stands_first(run):
    records = [run(arm, 1e-3, seed) for arm in ("mea", "transformer", "groupnorm") for seed in range(2)]
    group = fit_records(records, QUICK)["results"]["groups"]["constant"]
    assert [arm["arm"] for arm in group["arms"]] == ["transformer", "mea", "groupnorm"]
    assert group["differences"][0]["first"] == "transformer"


def test_the_paper_rule_tells_the_range_of_what_it_takes(run):
    """A spike in one of two seeds: with one seed each, the rule takes either rate about every second time."""
    records = [run("a", 1e-3, seed) for seed in range(2)] + [run("a", 2e-3, seed, spike=seed == 1) for seed in range(2)]
    arm = fit_records(records, QUICK)["results"]["groups"]["constant"]["arms"][0]
    assert arm["paper_lr"] == 1e-3
    assert arm["rules"]["paper"]["lrs"] == [1e-3, 2e-3]


def test_factorial_effects(run):
    gain = {"none": 0.0, "k": -0.02, "v": -0.04, "kv": -0.06}
    records = [
        run(f"{mixing}-{norm}", 1e-3, seed, shift=gain[mixing] - 0.1 * norm, noise=1e-4, mixing=mixing, norm=norm)
        for mixing in gain
        for norm in (False, True)
        for seed in range(3)
    ]
    effects = {e["effect"]: e for e in fit_records(records, QUICK)["results"]["groups"]["constant"]["effects"]}
    for name, truth in (("norm", -0.1), ("keys mixed", -0.02), ("values mixed", -0.04), ("keys mixed × norm", 0.0)):
        assert effects[name]["value"] == pytest.approx(truth, abs=2e-3)
        low, high = effects[name]["interval"]
        assert low - 1e-4 <= truth <= high + 1e-4


def test_factors_of_plain_variants_need_no_labels(run):
    """Arms of another experiment, whose records tell their variant alone, take their places in the design."""
    plain = {"transformer": ("none", False), "groupnorm": ("none", True), "mea_no_norm": ("kv", False)}
    plain |= {"mea": ("kv", True), "mea_keys": ("k", True), "mea_values": ("v", True)}
    plain |= {"mea_keys_no_norm": ("k", False), "mea_values_no_norm": ("v", False)}
    records = [
        run(arm, 1e-3, seed, shift=-0.1 * norm, noise=1e-4) for arm, (_, norm) in plain.items() for seed in (0, 1)
    ]
    control = run("mea", 1e-3, 0, shift=5.0)
    control["config"]["arm"] = "frozen"  # is no part of it
    records.append(control)
    effects = fit_records(records, QUICK)["results"]["groups"]["constant"]["effects"]
    assert {e["effect"]: e["value"] for e in effects}["norm"] == pytest.approx(-0.1, abs=2e-3)


def both_ways(run, best_constant: int, best_decayed: int, arm: str = "a", gain: float = 0.0, **options):
    """An arm at four rates, at a constant rate and with decay, best at one of them."""
    return [
        run(arm, rate, seed, shift=gain + 0.1 * (index - best) ** 2, schedule=schedule, **options)
        for schedule, best in (("constant", best_constant), ("wsd", best_decayed))
        for index, rate in enumerate((1e-3, 3e-3, 1e-2, 3e-2))
        for seed in range(2)
    ]


def test_a_choice_at_a_constant_rate_that_does_not_hold_after_decay(run):
    results = fit_records(both_ways(run, 1, 2), QUICK)["results"]
    (line,) = results["after_decay"]
    assert (line["best_constant"], line["best_decayed"]) == (3e-3, 1e-2)
    for name in ("constant", "early", "held", "far"):
        assert line["rules"][name]["lr"] == 3e-3
        assert line["rules"][name]["probability"] < 0.2
        assert line["rules"][name]["regret"] == pytest.approx(0.1, rel=0.3)
    # No run has a spike: the paper's rule takes the largest rate, always, which loses 0.1 too.
    assert line["rules"]["paper"]["probability"] < 0.05
    assert line["rules"]["paper"]["regret"] == pytest.approx(0.1, rel=0.1)
    assert results["groups"]["constant"]["fits"]
    assert not results["groups"]["wsd"]["fits"]  # decay follows no power law


def test_a_choice_that_holds(run):
    """The order of eight cells is the same both ways but for noise; of the two arms b is better at every rate."""
    records = both_ways(run, 1, 1, noise=1e-4) + both_ways(run, 1, 1, arm="b", gain=-0.03, noise=1e-4)
    lines = {line["arm"]: line for line in fit_records(records, QUICK)["results"]["after_decay"]}
    assert list(lines) == ["a", "b", "all arms"]
    assert lines["a"]["rules"]["constant"]["probability"] == 1
    together = lines["all arms"]
    assert together["correlation"] == pytest.approx(1, abs=0.03)  # 1e-3 and 1e-2 of one arm differ by noise alone
    assert (together["best_constant_arm"], together["best_decayed_arm"]) == ("b", "b")
    lost = pytest.approx(0.13 / QUICK.draws, rel=1e-2)  # two seeds have long tails: one replicate takes a rate of a
    assert together["rules"]["constant"] == {"arm": "b", "lr": 3e-3, "probability": 1, "regret": lost}
    assert "paper" not in together["rules"]


def test_a_choice_loses_no_more_than_the_rates_are_apart(run):
    """Two seeds make replicates that are thousands of nats off now and then: their mean once was what a choice lost."""
    results = fit_records(both_ways(run, 1, 1, noise=0.02), QUICK)["results"]
    (line,), (arm,) = results["after_decay"], results["groups"]["constant"]["arms"]
    for rules in (line["rules"], arm["rules"]):
        assert all(rule["regret"] < 0.5 for rule in rules.values())  # the worst rate is 0.4 above the best


def test_a_grid_that_is_not_full_yet_is_analysed_as_far_as_it_goes(run):
    """Two rates run both ways make no order; a rate run one way only, or an arm without decay, is left out."""
    records = [r for r in both_ways(run, 1, 1) if r["config"]["learning_rate"] < 5e-3]
    assert fit_records([*records, run("b", 1e-3, 0)], QUICK)["results"]["after_decay"] == []


def test_sensitivity_is_the_mean_excess_over_log_rates():
    rates = np.array([1e-3, 1e-2, 1e-1])
    assert sensitivity(rates, np.array([2.5, 2.0, 99.0]), 4.0) == pytest.approx((0.25 + 1.0) / 2)


def test_rank_correlation():
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([5.0, 7, 9])) == pytest.approx(1)
    assert np.isnan(rank_correlation(np.array([1.0, 1, 1]), np.array([5.0, 7, 9])))


def test_same_records_give_the_same_numbers(known):
    assert fit_records(synthetic_runs.sweep(), QUICK)["results"] == known["results"]


def test_errors(run):
    with pytest.raises(ValueError, match="no record of the kind 'pretraining' among 0"):
        fit_records([])
    with pytest.raises(ValueError, match=r"two runs of a at learning rate 0\.001, constant, seed 0"):
        fit_records([run("a", 1e-3, 0), run("a", 1e-3, 0)])
    with pytest.raises(ValueError, match="one preset and length only"):
        fit_records([run("a", 1e-3, 0), run("a", 1e-3, 1, preset="3m")])
    with pytest.raises(ValueError, match=r"skip is 0\.6"):
        FitSettings(skip=0.6)
