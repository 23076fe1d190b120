"""Known constants come back from synthetic curves, and the cost is the one that is stated."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from mea.scaling.power_law import fit_power_law

TOKENS = np.linspace(2e5, 4e6, 25)


def law(tokens, alpha, scale, floor):
    return (scale / tokens) ** alpha + floor


@pytest.mark.parametrize(
    ("alpha", "scale", "floor"), [(0.3, 5e5, 2.1), (0.08, 3e9, 1.0), (1.1, 9e5, 3.3), (0.5, 1e6, 0.0)]
)
def test_exact_curves_give_their_constants(alpha, scale, floor):
    fit = fit_power_law(TOKENS, law(TOKENS, alpha, scale, floor))
    assert float(fit.exponent) == pytest.approx(alpha, rel=2e-3)
    assert float(fit.scale) == pytest.approx(scale, rel=2e-2)
    assert float(fit.floor) == pytest.approx(floor, abs=5e-3)
    assert float(fit(8e6)) == pytest.approx(law(8e6, alpha, scale, floor), rel=1e-5)
    assert not fit.at_edge


def test_many_curves_at_once_are_each_fitted_alone():
    alphas = np.array([0.2, 0.5, 0.9])
    curves = law(TOKENS, alphas[:, None], 1e6, 2.0)
    together = fit_power_law(TOKENS, curves, delta=1e-3)
    np.testing.assert_allclose(together.exponent, alphas, rtol=2e-3)
    for index, curve in enumerate(curves):
        assert float(fit_power_law(TOKENS, curve, delta=1e-3).exponent) == together.exponent[index]
    assert together([1e6, 2e6]).shape == (3, 2)


def test_cost_is_as_low_as_a_general_minimiser_gets():
    rng = np.random.default_rng(0)
    curve = law(TOKENS, 0.4, 1e6, 2.0) * np.exp(0.01 * rng.standard_normal(len(TOKENS)))
    delta = 5e-3
    fit = fit_power_law(TOKENS, curve, delta=delta)

    def cost(logs):
        alpha, amplitude, floor = np.exp(logs)
        return huber(delta, np.log((amplitude * (TOKENS / fit.reference) ** -alpha + floor) / curve)).sum()

    mine = np.log([fit.exponent, fit.amplitude, fit.floor])
    starts = [mine, mine + 0.3, np.log([0.3, 0.5, 2.0])]
    best = min(minimize(cost, start, method="Nelder-Mead", options={"maxiter": 4000}).fun for start in starts)
    assert cost(mine) <= best * (1 + 2e-3)


def test_an_outlier_hardly_moves_the_fit():
    """What Huber's cost is for: least squares on the same curve puts the floor elsewhere."""
    curve = law(TOKENS, 0.4, 1e6, 2.0)
    curve[15] *= 1.3
    fit = fit_power_law(TOKENS, curve)
    assert float(fit.floor) == pytest.approx(2.0, abs=0.02)
    loose = fit_power_law(TOKENS, curve, delta=10.0)  # everything is quadratic
    assert abs(float(loose.floor) - 2.0) > 0.05


def test_a_curve_that_rises_has_no_amplitude():
    fit = fit_power_law(TOKENS, np.linspace(3, 4, len(TOKENS)))
    assert float(fit.amplitude) == 0
    assert 3 < float(fit.floor) < 4


@pytest.mark.parametrize(
    ("tokens", "losses", "message"),
    [
        ([1, 2, 3], [3, 2, 1], "at least 4 points, not 3"),
        ([1, 2, 3, 4], [3, 2, 1, float("nan")], "positive and finite"),
        ([1, 2, 3, 4], [3, 2, 1], r"shape \(3,\) do not go with \(4,\)"),
    ],
)
def test_errors(tokens, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(tokens, losses)
