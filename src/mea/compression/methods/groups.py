"""Groups of neighbouring heads with separate latents, so that each group can stay on one rank of tensor parallelism.

Any method with separate latents for keys and values is applied to each group as if the layer had no other heads. The
layer's output is the sum over groups, as for ``W_O`` split by rows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics, ScoreMoments
from mea.compression.methods.base import Factorise, Method
from mea.compression.methods.factors import Factors


def in_groups(method: Method, groups: int, num_kv_heads: int) -> Method:
    """The same method for this number of groups of heads, each with an equal share of the ranks.

    Raises
    ------
    ValueError
        The number of heads is no multiple of `groups`, or the method's latents cannot be divided.
    """
    if groups == 1:
        return method
    if groups < 1 or num_kv_heads % groups:
        raise ValueError(f"{num_kv_heads} key/value heads cannot be divided into {groups} equal groups")
    method.form.check(groups, groups, groups)
    if method.whole_heads and num_kv_heads == groups:
        raise ValueError(
            f"{method.name!r} mixes whole heads, and each of the {groups} groups would have one head: give fewer groups"
        )

    def averaged(moments: AveragedValues, num_kv_heads: int, rank: int) -> tuple[Factors, Tensor]:
        parts = [
            method.averaged(_averaged_of(moments, group, groups), num_kv_heads // groups, rank // groups)
            for group in range(groups)
        ]
        return side_by_side([factors for factors, _ in parts]), torch.cat([output for _, output in parts], dim=1)

    return replace(
        method,
        keys=by_group(method.keys, groups),
        values=method.values and by_group(method.values, groups),
        averaged=averaged,
        full_rank_values=by_group(method.full_rank_values, groups),
        groups=groups,
    )


def by_group(factorise: Factorise, groups: int) -> Factorise:
    """From a layer's statistics to the factors of all groups, block by block."""

    def grouped(statistics: LayerStatistics, rank: int) -> Factors:
        return side_by_side([factorise(_part(statistics, group, groups), rank // groups) for group in range(groups)])

    return grouped


def side_by_side(parts: list[Factors]) -> Factors:
    """Factors of all heads from those of each group: zero between a group's latents and another's heads."""
    return Factors(torch.block_diag(*(part.encoder for part in parts)), torch.block_diag(*(p.decoder for p in parts)))


def _part(statistics: LayerStatistics, group: int, groups: int) -> LayerStatistics:
    def heads(stacked: Tensor) -> Tensor:
        return stacked.chunk(groups)[group]

    def square(moment: Tensor) -> Tensor:
        return heads(moment).chunk(groups, dim=1)[group]

    scores = statistics.scores
    return replace(
        statistics,
        **{name: square(getattr(statistics, name)) for name in ("keys", "values", "cross")},
        **{name: heads(getattr(statistics, name)) for name in ("queries", "output", "key_weight", "value_weight")},
        scores=scores and ScoreMoments(square(scores.keys), square(scores.first), heads(scores.queries)),
    )


def _averaged_of(moments: AveragedValues, group: int, groups: int) -> AveragedValues:
    """The moments of one group: of its query heads, whose blocks are separate, and of its values."""

    def own(of_blocks: Tensor, *dims: int) -> Tensor:
        for dim in (0, *dims):
            of_blocks = of_blocks.chunk(groups, dim=dim)[group]
        return of_blocks

    return AveragedValues(own(moments.gram, 2, 4), own(moments.target, 2), moments.energy, own(moments.output_weight))
