"""Position-averaged keys: the best linear map of *rotated* keys over all positions that the model supports.

The second moments of rotated keys and queries are averaged over every supported position. Fast frequencies turn so
often that nothing remains between them, and come out as in `frequency`; slow ones hardly turn, and are pooled with each
other. Moments of rotated keys taken at the short positions of the calibration windows instead look better there and are
ruined beyond: the average is what makes the choice hold at every position.
"""

from mea.compression.calibrate.rope_moments import average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.factors import Factors, Moments, orthonormal, weighted_subspace


def moments(statistics: LayerStatistics) -> Moments:
    """Of rotated keys and queries, averaged over positions."""
    cos, sin = statistics.cos, statistics.sin
    return Moments(
        average_over_positions(statistics.keys, cos, sin), average_over_positions(statistics.queries, cos, sin)
    )


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of rotated keys."""
    return orthonormal(*weighted_subspace(*moments(statistics), rank))
