"""Paired differences against other ways to the same number, and against simulated evaluations."""

from math import comb

import numpy as np
import pytest

from mea.evaluate.paired import average_difference, bootstrap_means, items_needed, paired_difference


def test_a_paired_error_leaves_out_what_both_models_share():
    first = [1, 1, 0, 0, 1, 0, 1, 1, 0, 1]
    second = [1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    found = paired_difference(first, second)
    assert found.difference == pytest.approx(0.2)
    assert (found.only_first, found.only_second) == (2, 0)
    assert found.standard_error == pytest.approx(np.std(np.subtract(first, second), ddof=1) / np.sqrt(10))
    assert found.p_value == pytest.approx(0.5)  # two heads in two throws, or two tails


def test_mcnemar_is_a_sign_test_of_the_items_that_differ():
    first, second = [1] * 8 + [0] * 2 + [1] * 5, [0] * 8 + [1] * 2 + [1] * 5
    expected = 2 * sum(comb(10, k) for k in (0, 1, 2)) / 2**10
    assert paired_difference(first, second).p_value == pytest.approx(expected)
    assert paired_difference([1.0, 0.5], [1.0, 0.25]).p_value is None  # no such test for what is not right or wrong


def test_identical_models_do_not_differ():
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.standard_error, found.interval, found.p_value) == (0, 0, (0, 0), 1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Nominal 95 % of 300 evaluations of 400 items; the count is binomial with standard deviation 3.8."""
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        gaps = generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=400)
        low, high = paired_difference(gaps, np.zeros(400), seed=seed).interval
        covered += low <= 0.05 <= high
    assert abs(covered - 285) < 4 * 3.8


def test_so_many_items_find_a_point_four_times_out_of_five():
    """Gaussian differences of standard deviation 0.2, mean 0.01: power 0.8, of 1,000 tries ± 4 standard deviations."""
    count = items_needed(0.2)
    means = np.random.default_rng(2).normal(0.01, 0.2 / np.sqrt(count), size=1000)
    assert (np.abs(means) > 1.96 * 0.2 / np.sqrt(count)).mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / 1000))


def test_both_ways_to_draw_agree_with_theory():
    """Few distinct values are drawn by their counts, many one by one: both scatter as the mean does."""
    generator = np.random.default_rng(3)
    for values in (generator.integers(0, 2, 200).astype(float), generator.normal(size=200)):
        means = bootstrap_means(values, 4000)
        expected = values.std() / np.sqrt(200)
        assert means.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * 4000))
        assert means.mean() == pytest.approx(values.mean(), abs=4 * expected / np.sqrt(4000))


def test_an_average_over_tasks_weights_them_alike():
    first = {"a": [1, 1, 0, 1], "b": [1, 0]}
    second = {"a": [0, 1, 0, 1], "b": [0, 0]}
    found = average_difference(first, second)
    assert found["difference"] == pytest.approx((0.25 + 0.5) / 2)
    parts = [paired_difference(first[task], second[task]).standard_error for task in first]
    assert found["standard_error"] == pytest.approx(np.hypot(*parts) / 2)
    with pytest.raises(ValueError, match="tasks differ: a, b and a"):
        average_difference(first, {"a": [1, 1, 1, 1]})


def test_other_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="paired scores of 3 and 2 items"):
        paired_difference([1, 0, 1], [1, 0])
