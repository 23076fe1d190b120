"""`attended` and `position` in equal parts: keys that are hardly ever looked at count as well.

What an error in a score does is known to first order only, under the attention of the calibration text. A key that
nobody looks at there counts for nothing in `attended`: its scores may come out so wrong that it is looked at, and what
another text would have found in it is lost. So the moments are the mean of those and of those in which all scores
count alike, either scaled to a trace of one.
"""

from torch import Tensor

from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods import attended, position
from mea.compression.methods.factors import Factors, orthonormal, weighted_subspace


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of rotated keys."""
    pairs = zip(attended.moments(statistics), position.moments(statistics), strict=True)
    moment, metric = (counted / _trace(counted) + alike / _trace(alike) for counted, alike in pairs)
    return orthonormal(*weighted_subspace(moment, metric, rank))


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum()
