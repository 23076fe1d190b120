"""Latents of rotated keys: the best linear map over all positions that the model supports.

The second moments of rotated keys and queries are averaged over every supported position. Fast frequencies turn so
often that nothing remains between them; slow ones hardly turn and are pooled with each other. Moments taken at the
short positions of the calibration windows look better there and fail beyond them (docs/LOG.md).

Weightings say how much each attention score counts in these moments (`WEIGHTINGS`: the share of the second kind):

- ``"uniform"``: every score counts alike.
- ``"sensitivity"``: a score counts by what an error in it does to the attention output, to first order
  (`mea.compression.calibrate.score_sensitivity`). The first token of a text is at position 0 always, and is not
  averaged over positions.
- ``"mean"``, the default: both in equal parts, each scaled to a trace of one. Sensitivities hold for the attention of
  the calibration text. A key that nobody looks at there counts for nothing, so its scores may come out so wrong that
  another text looks at it.
- ``"frequency"``: uniform, and averaged over independent phases of the frequencies instead of positions, the limit of
  ever more positions. What remains is a complex mixing of heads per rotary frequency, exact under RoPE.
"""

from functools import partial

from torch import Tensor

from mea.compression.calibrate.rope_moments import average_over_phases, average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, Moments, orthonormal, weighted_subspace

WEIGHTINGS: dict[str, float | None] = {"mean": 0.5, "uniform": 0.0, "sensitivity": 1.0, "frequency": None}


def keys(statistics: LayerStatistics, rank: int, *, weighting: str) -> Factors:
    """Factors of rotated keys; `rank` is even with ``"frequency"``: two numbers per complex component."""
    return orthonormal(*weighted_subspace(*moments(statistics, weighting), rank))


def moments(statistics: LayerStatistics, weighting: str) -> Moments:
    """Of rotated keys and queries."""
    share = WEIGHTINGS[weighting]
    if share is None:
        d = statistics.head_dim
        return Moments(average_over_phases(statistics.keys, d), average_over_phases(statistics.queries, d))
    if share in (0.0, 1.0):
        return _by_sensitivity(statistics) if share else _uniform(statistics)
    keys, metric = (
        2 * share * (weighted / _trace(weighted)) + 2 * (1 - share) * (uniform / _trace(uniform))
        for weighted, uniform in zip(_by_sensitivity(statistics), _uniform(statistics), strict=True)
    )
    return Moments(keys, metric)


def _uniform(statistics: LayerStatistics) -> Moments:
    cos, sin = statistics.cos, statistics.sin
    return Moments(
        average_over_positions(statistics.keys, cos, sin), average_over_positions(statistics.queries, cos, sin)
    )


def _by_sensitivity(statistics: LayerStatistics) -> Moments:
    scores, (cos, sin) = statistics.scores, (statistics.cos, statistics.sin)
    assert scores is not None  # `Method.needs_scores` asks for it
    keys = average_over_positions(scores.keys, cos, sin) + average_over_positions(scores.first, cos[:1], sin[:1])
    return Moments(keys, average_over_positions(scores.queries, cos, sin))


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum()


METHODS = tuple(
    Method("post_rope", partial(keys, weighting=weighting), needs_scores=bool(share), weighting=weighting)
    for weighting, share in WEIGHTINGS.items()
)
