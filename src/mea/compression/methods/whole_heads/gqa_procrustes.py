"""Grouped-query attention after Procrustes alignment (arXiv 2412.20677): similar heads are aligned, then pooled.

Value heads are multiplied by orthogonal matrices and key heads by a phase per rotary frequency, the only orthogonal
maps that commute with RoPE. Both are undone when the cache is read, so that only the pooling causes an error. The heads
that are most similar after alignment form a group. As in the paper, alignment uses activations and all tokens have
equal weight. The paper then trains the grouped model; this method does not.
"""

from jaxtyping import Num
from torch import Tensor, eye, linalg, zeros

from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors
from mea.compression.methods.whole_heads.gauge_maps import head_matrices, key_blocks, value_blocks

ROUNDS = 20


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of post-RoPE keys."""
    return _pool(key_blocks(statistics.keys, statistics.head_dim), rank // statistics.head_dim)


def values(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of values."""
    return _pool(value_blocks(statistics.values, statistics.head_dim), rank // statistics.head_dim)


def grouping(moment: Num[Tensor, "b g a g a"], count: int) -> list[list[int]]:
    """`count` groups of heads, by repeatedly joining the two groups with the smallest mean distance.

    The distance of two heads is the energy of their difference after the best alignment.
    """
    own = moment.diagonal(dim1=1, dim2=3).diagonal(dim1=1, dim2=2).real.sum((0, 2))  # |x_g|^2
    shared = linalg.svdvals(moment.transpose(2, 3)).sum((0, 3))
    distance = own[:, None] + own - 2 * shared
    groups = [[head] for head in range(len(own))]
    while len(groups) > count:
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        i, j = min(pairs, key=lambda pair: distance[groups[pair[0]]][:, groups[pair[1]]].mean().item())
        groups[i] += groups.pop(j)
    return groups


def align(moment: Num[Tensor, "b g a g a"], group: list[int]) -> Num[Tensor, "b m a a"]:
    """Orthogonal (unitary) maps of the group's heads that bring them nearest to their common mean."""
    maps = (
        eye(moment.shape[2], dtype=moment.dtype, device=moment.device).expand(len(moment), len(group), -1, -1).clone()
    )
    for _ in range(ROUNDS if len(group) > 1 else 0):
        for member, head in enumerate(group):
            others = [i for i in range(len(group)) if i != member]
            cross = moment[:, head][:, :, [group[i] for i in others]].movedim(2, 1)  # b other a a
            left, _, right = linalg.svd((cross @ maps[:, others].mH).sum(1))
            maps[:, member] = right.mH @ left.mH
    return maps


def _pool(moment: Num[Tensor, "b g a g a"], count: int) -> Factors:
    b, g, a = moment.shape[:3]
    d = b * a * (2 if moment.is_complex() else 1)
    decoder = zeros(g, d, count, d, dtype=moment.real.dtype, device=moment.device)
    for component, group in enumerate(grouping(moment, count)):
        decoder[group, :, component] = head_matrices(align(moment, group)).transpose(1, 2) / len(group) ** 0.5
    decoder = decoder.reshape(g * d, count * d)
    return Factors(decoder.T, decoder)


METHODS = (Method("gqa-procrustes", keys, values, whole_heads=True),)
