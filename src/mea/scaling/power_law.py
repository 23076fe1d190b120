"""``L(D) = (D_c / D)^α + L_0``: loss against tokens at one learning rate (arXiv 2601.19611).

Given α, the law is linear in ``A = D_c^α`` and ``L_0``: so α is searched in one dimension and the rest is solved. The
cost is Huber's on the logarithm of the loss, as in Hoffmann et al. (arXiv 2203.15556). Everything works on many
curves at once, for the bootstrap.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXPONENTS = (0.02, 4.0)  # searched range of α
GRID = 14  # exponents tried before the search narrows
NARROWING = 20  # steps of the golden section
REWEIGHTING = 6  # steps towards the solution for one exponent
EFFICIENT = 1.345  # Huber's δ in units of the residuals' scale: 95 % as efficient as least squares on normal errors
TIGHTEST = 1e-5  # δ of curves without noise


@dataclass(frozen=True)
class PowerLaw:
    """Fitted constants, one of each per curve.

    Attributes
    ----------
    exponent : array
        The paper's α.
    amplitude : array
        ``D_c^α / reference^α``: the loss above the floor after `reference` tokens.
    floor : array
        The paper's ``L_0``, at least 0.
    reference : float
        Tokens.
    delta : float
        Where Huber's cost turns linear.
    """

    exponent: NDArray
    amplitude: NDArray
    floor: NDArray
    reference: float
    delta: float

    @property
    def scale(self) -> NDArray:
        """The paper's ``D_c``, in tokens."""
        with np.errstate(over="ignore"):
            return np.asarray(self.reference * self.amplitude ** (1 / self.exponent))

    @property
    def at_edge(self) -> NDArray:
        """Whether the exponent ran into the end of the searched range: such a curve does not determine it."""
        low, high = EXPONENTS
        return np.asarray((self.exponent < 1.02 * low) | (self.exponent > 0.98 * high))

    def __call__(self, tokens: ArrayLike | float) -> NDArray:
        """Loss after `tokens`: the shape of the fit, followed by that of `tokens`."""
        relative = np.asarray(tokens, float) / self.reference
        alpha, amplitude, floor = (
            np.expand_dims(x, tuple(range(np.ndim(x), np.ndim(x) + relative.ndim)))
            for x in (self.exponent, self.amplitude, self.floor)
        )
        return np.asarray(amplitude * relative**-alpha + floor)


def fit_power_law(tokens: ArrayLike, losses: ArrayLike, *, delta: float | None = None) -> PowerLaw:
    """Fit one or many curves.

    Parameters
    ----------
    tokens : array ``[n]``
        At least 4 different counts, positive.
    losses : array ``[..., n]``
        Positive losses at these counts.
    delta
        Where Huber's cost turns linear, in units of log loss; by default `EFFICIENT` times the robust scale of the
        residuals of a first fit to the mean curve.

    Raises
    ------
    ValueError
        Too few points, or values that are not positive and finite.
    """
    tokens, losses = np.asarray(tokens, float), np.asarray(losses, float)
    if tokens.ndim != 1 or losses.shape[-1:] != tokens.shape:
        raise ValueError(f"losses of shape {losses.shape} do not go with {tokens.shape} token counts")
    if len(np.unique(tokens)) < 4:
        raise ValueError(f"a fit of three constants needs at least 4 points, not {len(np.unique(tokens))}")
    if not (np.isfinite(losses).all() and (losses > 0).all() and (tokens > 0).all()):
        raise ValueError("token counts and losses must be positive and finite")
    reference = float(np.exp(np.log(tokens).mean()))
    curves = losses.reshape(-1, len(tokens))
    if delta is None:
        middle = np.exp(np.log(curves).mean(0, keepdims=True))
        first = _search(tokens / reference, middle, 1.0)
        residuals = np.log(_law(tokens / reference, *first) / middle)
        delta = max(EFFICIENT * 1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))), TIGHTEST)
    exponent, amplitude, floor = (x.reshape(losses.shape[:-1]) for x in _search(tokens / reference, curves, delta))
    return PowerLaw(exponent, amplitude, floor, reference, float(delta))


def _search(relative: NDArray, curves: NDArray, delta: float) -> tuple[NDArray, NDArray, NDArray]:
    """The exponent of least cost for every curve: a grid, then the golden section around its best point."""
    grid = np.linspace(np.log(EXPONENTS[0]), np.log(EXPONENTS[1]), GRID)
    costs = np.stack([_solve(relative, curves, np.full(len(curves), a), delta)[2] for a in grid])
    best = costs.argmin(0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, GRID - 1)]
    golden = (5**0.5 - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = (_solve(relative, curves, x, delta)[2] for x in (left, right))
    for _ in range(NARROWING):
        down = at_left < at_right
        low, high = np.where(down, low, left), np.where(down, right, high)
        fresh = np.where(down, high - golden * (high - low), low + golden * (high - low))
        cost = _solve(relative, curves, fresh, delta)[2]
        left, right = np.where(down, fresh, right), np.where(down, left, fresh)
        at_left, at_right = np.where(down, cost, at_right), np.where(down, at_left, cost)
    middle = (low + high) / 2
    amplitude, floor, _ = _solve(relative, curves, middle, delta)
    return np.exp(middle), amplitude, floor


def _solve(relative: NDArray, curves: NDArray, log_alpha: NDArray, delta: float) -> tuple[NDArray, NDArray, NDArray]:
    """Amplitude, floor and cost of every curve for its exponent: Gauss-Newton steps of reweighted least squares."""
    x = np.exp(-np.exp(log_alpha)[:, None] * np.log(relative))
    weight, target = curves**-2, curves
    for step in range(REWEIGHTING + 1):
        amplitude, floor = _line(x, target, weight)
        predicted = np.maximum(amplitude[:, None] * x + floor[:, None], 1e-9)
        residual = np.log(predicted / curves)
        size = np.abs(residual)
        if step < REWEIGHTING:
            weight = np.minimum(1, delta / np.maximum(size, 1e-300)) / predicted**2
            target = predicted * (1 - residual)
    cost = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum(-1)
    return amplitude, floor, cost


def _line(x: NDArray, y: NDArray, weight: NDArray) -> tuple[NDArray, NDArray]:
    """Weighted least squares of ``y = a x + c`` in every row, with neither below 0."""
    total = weight.sum(-1)
    mean_x, mean_y = (weight * x).sum(-1) / total, (weight * y).sum(-1) / total
    spread = (weight * (x - mean_x[:, None]) ** 2).sum(-1)
    slope = (weight * (x - mean_x[:, None]) * (y - mean_y[:, None])).sum(-1) / np.maximum(spread, 1e-300)
    slope = np.maximum(slope, 0)
    floor = mean_y - slope * mean_x
    through_zero = (weight * x * y).sum(-1) / (weight * x * x).sum(-1)
    below = floor < 0
    return np.where(below, through_zero, slope), np.where(below, 0, floor)


def _law(relative: NDArray, exponent: NDArray, amplitude: NDArray, floor: NDArray) -> NDArray:
    return amplitude[:, None] * relative ** -exponent[:, None] + floor[:, None]
