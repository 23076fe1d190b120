"""The paper's virtual heads (arXiv 2601.19611, Appendix F): truncated SVD of the weights over heads.

``W_K`` is reshaped to ``[d * D, h_kv]``, a column per head; its top ``h_c`` left singular vectors are the component
heads' weights, singular values and right vectors the mixing matrix ``W_lc``. Since ``U = W V / S``, the component heads
are themselves combinations of the original ones, so encoding with ``V^T`` and decoding with ``V`` keeps the same
subspace of heads. A bias is a further input channel. With a norm on the keys, the norm's gain is multiplied into the
weights and the mixing comes after the norm: before the norm, the paper's factors would not be exact at any rank.
"""

from jaxtyping import Float
from torch import Tensor, linalg

from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, from_head_mixing


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of post-RoPE keys; RoPE is the same for all heads, so the mixing of pre-RoPE keys applies."""
    return _factorise(statistics.key_weight, statistics.head_dim, rank)


def values(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of values."""
    return _factorise(statistics.value_weight, statistics.head_dim, rank)


def _factorise(weight: Float[Tensor, "n _"], head_dim: int, rank: int) -> Factors:
    heads = weight.double().view(-1, head_dim * weight.shape[1])
    mixing, _, _ = linalg.svd(heads, full_matrices=False)
    return from_head_mixing(mixing[:, : rank // head_dim].T, head_dim)


METHODS = (Method("svd", keys, values, whole_heads=True),)
