"""Groups of neighbouring heads with latents of their own, so that each can stay on one rank of tensor parallelism.

Any method with latents of keys and values apart does this group by group: it sees one group's heads as if the layer had
no others. What the groups' heads add to the layer's output adds up, as in ``W_O`` split by rows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics, ScoreMoments
from mea.compression.methods.base import Factorise, Method
from mea.compression.methods.factors import Factors


def in_groups(method: Method, groups: int, num_kv_heads: int) -> Method:
    """The same method for so many groups of heads, each with an equal share of the ranks.

    Raises
    ------
    ValueError
        The heads do not come out even, or the method's latents cannot be divided.
    """
    if groups == 1:
        return method
    if groups < 1 or num_kv_heads % groups:
        raise ValueError(f"{num_kv_heads} key/value heads cannot be divided into {groups} equal groups")
    method.form.check(groups, groups, groups)
    if method.whole_heads and num_kv_heads == groups:
        raise ValueError(
            f"{method.name!r} mixes whole heads, of which {groups} groups have one each: give fewer groups"
        )

    def averaged(moments: AveragedValues, num_kv_heads: int, rank: int) -> tuple[Factors, Tensor]:
        parts = [
            method.averaged(_averaged_of(moments, place, groups), num_kv_heads // groups, rank // groups)
            for place in range(groups)
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
        return side_by_side([factorise(_part(statistics, place, groups), rank // groups) for place in range(groups)])

    return factorise if groups == 1 else grouped


def side_by_side(parts: list[Factors]) -> Factors:
    """Factors of all heads from those of each group: zero between a group's latents and another's heads."""
    return Factors(torch.block_diag(*(part.encoder for part in parts)), torch.block_diag(*(p.decoder for p in parts)))


def _part(statistics: LayerStatistics, place: int, groups: int) -> LayerStatistics:
    def heads(stacked: Tensor) -> Tensor:
        return stacked.chunk(groups)[place]

    def square(moment: Tensor) -> Tensor:
        return heads(moment).chunk(groups, dim=1)[place]

    scores = statistics.scores
    return replace(
        statistics,
        **{name: square(getattr(statistics, name)) for name in ("keys", "values", "cross")},
        **{name: heads(getattr(statistics, name)) for name in ("queries", "output", "key_weight", "value_weight")},
        scores=scores and ScoreMoments(square(scores.keys), square(scores.first), heads(scores.queries)),
    )


def _averaged_of(moments: AveragedValues, place: int, groups: int) -> AveragedValues:
    """Of one group's query heads, which have blocks of their own, and its values."""

    def own(of_blocks: Tensor, *dims: int) -> Tensor:
        for dim in (0, *dims):
            of_blocks = of_blocks.chunk(groups, dim=dim)[place]
        return of_blocks

    return AveragedValues(own(moments.gram, 2, 4), own(moments.target, 2), moments.energy, own(moments.output_weight))
