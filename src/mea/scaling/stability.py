"""Loss spikes: points far from the rolling mean of the points before.

The score is that of OLMo 2 (arXiv 2501.00656): the share of points at least seven standard deviations away
from the rolling mean of the last 1,000.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

WINDOW = 1000
FAR = 7.0
NEIGHBOURS = 10  # far points at most so many steps apart are one event


def spike_distances(values: ArrayLike, window: int | None = None) -> NDArray:
    """Distance of every point from the mean of the `window` points before it, in their standard deviations.

    Parameters
    ----------
    values : array ``[n]``
        One value per step; one that is not finite counts as infinitely far above, and later windows ignore it.
    window
        By default `WINDOW`, or a third of a run that is shorter than three windows. The point itself does not belong to
        its window: within 50 points it could never be 7 deviations away.

    Returns
    -------
    array ``[n - window]``
        Signed; empty if there are not 6 points or more.
    """
    values = np.asarray(values, float)
    window = window or min(WINDOW, len(values) // 3)
    if window < 2:
        return np.empty(0)
    finite = np.isfinite(values)
    held = values.copy()
    if not finite.all():  # the last finite value stands in
        last = np.maximum.accumulate(np.where(finite, np.arange(len(values)), 0))
        held = np.where(finite, values, values[last])
        held[~np.isfinite(held)] = 0.0
    before = np.lib.stride_tricks.sliding_window_view(held, window)[:-1]
    spread = before.std(-1)
    distance = (held[window:] - before.mean(-1)) / np.maximum(spread, 1e-12)
    return np.where(finite[window:], distance, np.inf)


def spike_score(values: ArrayLike, window: int | None = None) -> float:
    """Share of points at least `FAR` deviations away, up or down; NaN if there are too few points."""
    distance = spike_distances(values, window)
    return float((np.abs(distance) >= FAR).mean()) if len(distance) else float("nan")


def has_spike(values: ArrayLike, window: int | None = None) -> bool:
    """Whether any point stands at least `FAR` deviations above the rolling mean: what the paper's rule looks for."""
    return bool((spike_distances(values, window) >= FAR).any())


def score_with_interval(runs: list[NDArray], level: float = 0.95) -> tuple[float, float, float, int]:
    """Score over several runs, its interval, and the number of separate events.

    The interval is the exact binomial one, with events in place of points: far points come in clusters, so the number
    of points is divided by the mean size of a cluster.
    """
    distances = [spike_distances(values) for values in runs]
    far = [np.flatnonzero(np.abs(distance) >= FAR) for distance in distances]
    points, count = sum(map(len, distances)), sum(map(len, far))
    events = sum(1 + int((np.diff(where) > NEIGHBOURS).sum()) for where in far if len(where))
    if not points:
        return float("nan"), float("nan"), float("nan"), 0
    trials = points * events / count if count else points
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(beta.ppf(1 - tail, events + 1, trials - events)) if trials > events else 1.0
    return count / points, low, high, events
