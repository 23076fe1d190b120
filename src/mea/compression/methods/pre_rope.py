"""Latent keys before RoPE, as in Palu (arXiv 2407.21118): of all linear maps of unrotated keys, the best.

Before rotation the keys of all heads and frequencies can be pooled, so that the same bytes keep more; but keys have to
be rebuilt and rotated at every read. An error of a key is rotated with it: what it costs is measured by the queries as
they are turned against it, averaged over all distances that the model supports.
"""

from mea.compression.calibrate.rope_moments import average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, orthonormal, weighted_subspace
from mea.ops.cache_forms import FORMS


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of keys before rotation."""
    metric = average_over_positions(statistics.queries, statistics.cos, statistics.sin)
    return orthonormal(*weighted_subspace(statistics.keys, metric, rank))


METHODS = (Method("pre_rope", keys, form=FORMS["pre_rope"]),)
