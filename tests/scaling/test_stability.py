"""What counts as a spike, and how sure the score is."""

import numpy as np
import pytest

from mea.scaling.stability import has_spike, score_with_interval, spike_distances, spike_score


def test_distance_is_from_the_points_before():
    values = np.random.default_rng(0).standard_normal(200)
    values[150] = 12.0
    distance = spike_distances(values, 50)
    before = values[100:150]
    assert len(distance) == 150
    assert distance[100] == pytest.approx((12.0 - before.mean()) / before.std())


def test_score_is_a_share_of_points_in_both_directions():
    values = np.random.default_rng(0).standard_normal(3001)
    assert spike_score(values) == 0
    values[[1500, 2500]] = 60.0, -60.0
    assert spike_score(values) == pytest.approx(2 / 2001)
    down = np.random.default_rng(0).standard_normal(3001)
    down[1500] = -60.0
    assert not has_spike(down)
    assert has_spike(values)


def test_short_runs_take_a_third_of_themselves():
    assert len(spike_distances(np.arange(90.0))) == 60
    assert len(spike_distances(np.arange(6000.0))) == 5000
    assert np.isnan(spike_score([1.0, 2.0]))


def test_a_value_that_is_not_finite_is_a_spike_and_spoils_nothing_after_it():
    values = np.random.default_rng(0).standard_normal(300)
    values[200] = np.nan
    assert (np.abs(spike_distances(values)) >= 7).sum() == 1


def test_interval_counts_a_cluster_once():
    calm = np.random.default_rng(0).standard_normal(3100)
    score, low, high, events = score_with_interval([calm])
    assert (score, low, events) == (0, 0, 0)
    assert 0 < high < 2.5 / 1000  # the rule of three, two-sided
    calm[2000:2005] += 80.0
    score, low, high, events = score_with_interval([calm])
    assert events == 1
    assert low < score < high
    assert high / score > 5  # one event says little about how often such events come
