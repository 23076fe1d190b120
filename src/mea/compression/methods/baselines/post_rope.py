"""Latents of post-RoPE keys: the best linear map over all positions that the model supports.

The second moments of post-RoPE keys and queries are averaged over every supported position. This removes correlations
between fast frequencies; slow frequencies hardly rotate and stay correlated. Moments taken only at the short positions
of the calibration windows have a smaller error there and fail beyond them (docs/LOG.md).

The weighting sets the weight of each attention score in these moments (`WEIGHTINGS`: the share of the sensitivity):

- ``"uniform"``: all scores have equal weight.
- ``"sensitivity"``: the weight is the first-order effect of a score error on the attention output
  (`mea.compression.calibrate.score_sensitivity`). The first token of a text is always at position 0, so it is not
  averaged over positions.
- ``"mean"``, the default: the mean of both, each scaled to a trace of one. Sensitivities come from the calibration
  text. A key without attention there would have weight zero, and the error of its scores could
  become so large that other texts attend to it.
- ``"frequency"``: uniform, and averaged over independent phases of the frequencies instead of positions, the limit of
  infinitely many positions. The result is a complex mixing of heads per rotary frequency, which commutes with RoPE.
"""

from functools import partial

import torch
from torch import Tensor

from mea.compression.calibrate.rope_moments import average_over_phases, average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, Moments, orthonormal, weighted_subspace

WEIGHTINGS: dict[str, float | None] = {"mean": 0.5, "uniform": 0.0, "sensitivity": 1.0, "frequency": None}


def keys(statistics: LayerStatistics, rank: int, *, weighting: str) -> Factors:
    """Factors of post-RoPE keys; `rank` is even with ``"frequency"``: two numbers per complex component."""
    return orthonormal(*weighted_subspace(*moments(statistics, weighting), rank))


def moments(statistics: LayerStatistics, weighting: str) -> Moments:
    """Second moments of post-RoPE keys and queries."""
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
    """The trace, or 1 for a moment of zeros."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum()
    return torch.where(trace > 0, trace, 1)


METHODS = tuple(
    Method("post_rope", partial(keys, weighting=weighting), needs_scores=bool(share), weighting=weighting)
    for weighting, share in WEIGHTINGS.items()
)
