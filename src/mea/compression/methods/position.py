"""Position-averaged keys: the best linear map of *rotated* keys over all positions that the model supports.

The second moments of rotated keys and queries are averaged over every supported position. Fast frequencies turn so
often that nothing remains between them, and come out as in `frequency`; slow ones hardly turn, and are pooled with each
other. Moments of rotated keys taken at the short positions of the calibration windows instead look better there and are
ruined beyond: the average is what makes the choice hold at every position.
"""

from mea.compression.factors import Factors, orthonormal, weighted_subspace
from mea.compression.rotation import average_over_positions
from mea.compression.statistics import LayerStatistics


def keys(statistics: LayerStatistics, width: int) -> Factors:
    """Factors of rotated keys."""
    moment = average_over_positions(statistics.keys, statistics.cos, statistics.sin)
    metric = average_over_positions(statistics.queries, statistics.cos, statistics.sin)
    return orthonormal(*weighted_subspace(moment, metric, width))
