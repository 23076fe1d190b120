"""Frequency-wise keys: a complex mixing of heads per rotary frequency, exact under RoPE at every position.

RoPE multiplies frequency ``f`` of every head by the same ``e^{i theta_f t}``, so complex combinations over heads
commute with it (`mea.ops.rope`). The best ones minimise the error of the scores, weighted by the energy of each group's
queries; how many components a frequency keeps follows from the largest eigenvalues of the layer. Both are what the
eigenvectors of the keys' second moment give once it is averaged over rotations by *unrelated* phases: between
frequencies nothing is left, and within one a complex number.
"""

from mea.compression.calibrate.rope_moments import average_over_phases
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.factors import Factors, orthonormal, weighted_subspace


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of rotated keys; `rank` is even, two numbers per complex component."""
    moment = average_over_phases(statistics.keys, statistics.head_dim)
    metric = average_over_phases(statistics.queries, statistics.head_dim)
    return orthonormal(*weighted_subspace(moment, metric, rank))
