"""Latent keys before RoPE, as in Palu (arXiv 2407.21118): the linear map with the least score error.

Before RoPE the keys of all heads and frequencies are correlated, so the error at equal bytes is smaller; but keys have
to be rebuilt and rotated at every read. A key's error is rotated with the key: its metric is the second moment of
queries rotated relative to the key, averaged over all distances that the model supports.
"""

from mea.compression.calibrate.rope_moments import average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, orthonormal, weighted_subspace
from mea.ops.cache_forms import FORMS


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of keys before RoPE."""
    metric = average_over_positions(statistics.queries, statistics.cos, statistics.sin)
    return orthonormal(*weighted_subspace(statistics.keys, metric, rank))


METHODS = (Method("pre_rope", keys, form=FORMS["pre_rope"]),)
