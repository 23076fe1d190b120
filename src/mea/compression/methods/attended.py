"""Position-averaged keys, counted by what errors in their scores do to the attention's output.

As `position`, but in the moments every score counts by `mea.compression.calibrate.score_sensitivity`, and the first
token of a text, whose key is at position 0 always and read by everybody, is not averaged over positions.
"""

from mea.compression.calibrate.rope_moments import average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.factors import Factors, Moments, orthonormal, weighted_subspace


def moments(statistics: LayerStatistics) -> Moments:
    """Of rotated keys and queries, averaged over positions and counted by what errors in their scores do."""
    attended, (cos, sin) = statistics.attended, (statistics.cos, statistics.sin)
    assert attended is not None  # `Method.attended` asks for it
    moment = average_over_positions(attended.keys, cos, sin) + average_over_positions(attended.first, cos[:1], sin[:1])
    return Moments(moment, average_over_positions(attended.queries, cos, sin))


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of rotated keys."""
    return orthonormal(*weighted_subspace(*moments(statistics), rank))
