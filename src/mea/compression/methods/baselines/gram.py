"""Virtual heads from activations: the scalar mixing with the least squared error of keys and values.

Minimises ``E_x sum_g |k_g - k̂_g|^2`` over scalar head mixings, where the paper's `svd` minimises the error of the
weights: the top eigenvectors of the ``h_kv x h_kv`` matrix ``E <k_g, k_g'>``, which RoPE does not change.
"""

from jaxtyping import Float
from torch import Tensor, linalg

from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, from_head_mixing


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of post-RoPE keys."""
    return _factorise(statistics.keys, statistics.head_dim, rank)


def values(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of values."""
    return _factorise(statistics.values, statistics.head_dim, rank)


def _factorise(moment: Float[Tensor, "n n"], head_dim: int, rank: int) -> Factors:
    heads = moment.shape[0] // head_dim
    products = moment.view(heads, head_dim, heads, head_dim).diagonal(dim1=1, dim2=3).sum(-1)
    _, vectors = linalg.eigh(products)
    return from_head_mixing(vectors.flip(-1)[:, : rank // head_dim].T, head_dim)


METHODS = (Method("gram", keys, values, whole_heads=True),)
