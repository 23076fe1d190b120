"""What the page says of a sweep: the numbers of the fit, every cell in a figure, and no fit where there is none."""

import json
import re

import pytest

from mea.report.sections import pretraining_curves as curves
from mea.report.sections.pretraining import sections
from mea.report.sections.scaling_fit import DECAY_RULES, _sensitivity, best_arms, fit_parts
from mea.scaling import FitSettings, fit_records
from synthetic_runs import sweep, synthetic


@pytest.fixture(scope="module")
def runs():
    return sweep()


@pytest.fixture(scope="module")
def fit(runs):
    return fit_records(runs, FitSettings(draws=200))


def table(parts, heading):
    return next(part.table for part in parts if part.heading == heading)


def test_tables_hold_the_numbers_of_the_record(fit):
    parts, group = fit_parts(fit), fit["results"]["groups"]["constant"]
    rates = table(parts, "Learning rates")
    for line, arm in zip(rates.lines, group["arms"], strict=True):
        assert line[:2] == [arm["arm"], f"{arm['best_lr']:g}"]
        assert line[2] == "{:.3f} ({:.3f} to {:.3f})".format(arm["loss"], *arm["interval"])
    assert rates.best == (1,)  # b has the lower loss
    losses = table(parts, "Losses and stability")
    assert len(losses.lines) == 8
    diverged = next(line for line in losses.lines if line[:2] == ["a", "0.03"])
    assert diverged[3:6] == ["3", "3", "3"]
    assert "14 degrees of freedom" in rates.note
    assert len(table(parts, "Fits of loss against tokens").lines) == 7
    assert len(table(parts, "Does the fit predict?").lines) == 3
    assert all(len(line) == len(part.table.header) for part in parts for line in part.table.lines)


def test_one_seed_is_not_passed_off_as_more(runs):
    fit = fit_records([run for run in runs if run["config"]["seed"] == 0], FitSettings(draws=200))
    assert "Every run has one seed" in table(fit_parts(fit), "Learning rates").note


def test_an_edge_of_the_grid_is_said(runs):
    fit = fit_records([run for run in runs if run["config"]["learning_rate"] > 2e-3], FitSettings(draws=200))
    rates = table(fit_parts(fit), "Learning rates")
    assert rates.lines[0][1] == "0.003 (edge)"
    assert "only one" not in rates.note


def test_one_rate_is_no_best_rate(runs):
    fit = fit_records([run for run in runs if run["config"]["learning_rate"] == 3e-3], FitSettings(draws=200))
    rates = table(fit_parts(fit), "Learning rates")
    assert [line[1] for line in rates.lines] == ["0.003 (only one)"] * 2
    assert [line[3] for line in rates.lines] == ["–"] * 2
    assert "no other learning rate was tried" in rates.note
    (section,) = sections([fit])
    assert section.parts[0].numbers[0][1].endswith("at the one learning rate that was tried")


def test_errors_of_the_prediction_where_there_are_too_few_rates_to_rank():
    runs = [synthetic("a", 1e-3, seed) for seed in range(2)]
    predicted = table(fit_parts(fit_records(runs, FitSettings(draws=200))), "Does the fit predict?")
    assert predicted.header[2:4] == ["predicted", "actual"]
    assert len(predicted.lines) == 1


def test_section_with_a_fit(runs, fit):
    (section,) = sections([*runs, fit])
    assert section.heading == "Pretraining: 1m, 4 million tokens"
    assert section.parts[0].numbers[0][0] == "b"
    names = [figure.name for part in section.parts for figure in part.figures]
    assert {"rates-constant", "best-constant", "spikes-constant", "predictions-constant", "loss-a-constant"} < set(
        names
    )
    assert len(set(names)) == len(names)


def test_section_without_a_fit(runs):
    (section,) = sections(runs)
    assert len(table(section.parts, "Runs").lines) == 24
    assert [figure.name for part in section.parts for figure in part.figures] == ["loss-a-constant", "loss-b-constant"]


def test_a_fit_of_other_runs_is_pointed_out(runs, fit):
    (section,) = sections([*runs[:-1], fit])
    assert section.parts[0].text.startswith("The fit was made of 24 runs, but 23 are here")


def test_sizes_have_sections_of_their_own(runs):
    found = sections([*runs, synthetic("a", 1e-3, 0, preset="3m")])
    assert [section.heading[:15] for section in found] == ["Pretraining: 1m", "Pretraining: 3m"]


def test_where_training_blows_up_is_drawn_and_the_minimum_once_more(fit):
    """The diverged cell of arm a at the largest rate is what the first figure has and the second has not."""
    whole, near = curves.rate_against_loss(fit["results"]["groups"]["constant"], "constant")
    assert [figure.name for figure in (whole, near)] == ["rates-constant", "rates-near-constant"]
    assert whole.svg.count("<use ") == near.svg.count("<use ") + 1


def test_a_curve_has_its_fitted_law(runs, fit):
    """Every fitted rate is drawn three times: training, validation, law; the diverged one has no law."""
    with_law, without = (curves.of_arms(runs, given, "constant")[0].svg for given in (fit, None))
    assert len(re.findall("stroke-dasharray: [^0]", with_law)) == 3
    assert not re.findall("stroke-dasharray: [^0]", without)


def test_effects_have_a_figure_and_a_table():
    arms = [(mixing, norm) for mixing in ("none", "k", "v", "kv") for norm in (False, True)]
    runs = [synthetic(f"{m}-{n}", 1e-3, s, mixing=m, norm=n, shift=-0.1 * n) for m, n in arms for s in range(2)]
    fit = fit_records(runs, FitSettings(draws=200))
    effects = table(fit_parts(fit), "Effects of mixing and norm")
    assert next(line for line in effects.lines if line[0] == "norm")[1].startswith("-0.1")
    assert "keys mixed × norm" in curves.effects(fit["results"]["groups"]["constant"], "constant").svg


def test_after_decay():
    runs = [
        synthetic("a", rate, seed, schedule=schedule, shift=0.1 * (index - best) ** 2)
        for schedule, best in (("constant", 1), ("cosine", 2))
        for index, rate in enumerate((1e-3, 3e-3, 1e-2))
        for seed in range(2)
    ]
    fit = fit_records(runs, FitSettings(draws=200))
    line = table(fit_parts(fit), "Does the choice at a constant learning rate hold after decay?").lines[0]
    assert line[4:6] == ["0.003", "0.01"]
    choices = table(fit_parts(fit), "Which choice is the best after decay?").lines
    assert [line[1] for line in choices][0::4] == ["lowest final loss, constant learning rate", DECAY_RULES["paper"]]
    (section,) = sections([*runs, fit])
    assert any(part.heading == "Learning rates (cosine schedule)" for part in section.parts)
    assert "decay-cosine" in [figure.name for part in section.parts for figure in part.figures]
    laws = [len(re.findall("stroke-dasharray: [^0]", f.svg)) for f in curves.of_arms(runs[:6], fit, "constant")]
    assert laws == [3]


def test_a_record_of_another_kind_is_refused(runs):
    with pytest.raises(ValueError, match="kind 'pretraining' holds no fits"):
        fit_parts(runs[0])


def test_sensitivities_with_shared_intervals_share_the_highlight():
    arms = [
        {"arm": name, "sensitivity": value, "sensitivity_interval": ends, "sensitivity_lrs": [1e-3, 1e-2]}
        for name, value, ends in (("a", 0.2, [0.1, 0.3]), ("b", 0.1, [0.05, 0.15]), ("c", 0.5, [0.4, 0.6]))
    ]
    part = _sensitivity({"arms": arms}, {})
    assert table([part], "Sensitivity to the learning rate").best == (0, 1)


def test_a_variant_whose_difference_may_be_zero_shares_the_lowest_loss(fit):
    group = json.loads(json.dumps(fit["results"]["groups"]["constant"]))
    assert [arm["arm"] for arm in best_arms(group)] == ["b"]
    group["differences"][0]["interval_with_choice"] = [-0.1, 0.02]
    assert [arm["arm"] for arm in best_arms(group)] == ["b", "a"]
    (section,) = sections([fit | {"results": fit["results"] | {"groups": {"constant": group}}}])
    number, meaning = section.parts[0].numbers[0]
    assert number == "2 of 2 variants"
    assert meaning.startswith("share the lowest loss (b, a: the 95 % intervals of their differences include 0)")
    assert table(section.parts, "Learning rates").best == (0, 1)
