"""Grouped-query attention by mean pooling (arXiv 2305.13245): neighbouring heads are replaced by their mean.

The usual start for training a model further with fewer kv heads. Groups may have unequal sizes, so that 3 heads can
become 2. Pooling weights and pooling activations are the same; with a norm on the keys, the pooling comes after the
norm.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors, from_head_mixing


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of post-RoPE keys."""
    return _pool(statistics, rank)


def values(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of values."""
    return _pool(statistics, rank)


def neighbours(heads: int, groups: int) -> Int[Tensor, " g"]:
    """The group of each head: consecutive heads, in groups whose sizes differ by at most one."""
    return torch.arange(heads) * groups // heads


def _pool(statistics: LayerStatistics, rank: int) -> Factors:
    heads, groups = statistics.num_kv_heads, rank // statistics.head_dim
    member = (torch.arange(groups)[:, None] == neighbours(heads, groups)).double()
    mixing = (member / member.sum(1, keepdim=True).sqrt()).to(statistics.keys.device)
    return from_head_mixing(mixing, statistics.head_dim)


METHODS = (Method("gqa-mean", keys, values, whole_heads=True),)
