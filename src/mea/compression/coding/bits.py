"""How many bits each component gets: reverse water-filling (Cover & Thomas, Elements of Information Theory, ch. 10).

A component whose loss without it is ``v`` nats costs ``v D(b)`` with ``b`` bits, where ``D(b)`` is the relative cost
of rounding to ``b`` bits. Under a budget of bits, each component by itself takes the ``b`` that minimises
``v D(b) + theta b``; one ``theta`` for all layers meets the budget. Rank truncation is 0 bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mea.ops.codes import TIERS, UNIT, Tiers, bits_per_token

# Squared errors relative to dropping a component are 4e-5, 0.01 and 0.25. Attention averages rounding errors out, and
# not what is missing, so few bits are worth more than that: chosen by perplexity on validation texts (docs/LOG.md).
NOISE = {8: 3.6e-5, 4: 8e-3, 2: 0.05, 0: 1.0}


@dataclass(frozen=True)
class Section:
    """Components that are coded together: sorted losses without each, in nats, and how many tokens hold them."""

    losses: Float[Tensor, " n"]
    tokens: int


def unit_of(count: int) -> int:
    """Tiers are multiples of it: whole vectors of a processor, or less where there are few components."""
    return UNIT if count >= 8 * UNIT else 8 if count >= 32 else 4


def tiers_at(section: Section, theta: float) -> Tiers:
    """Components with 8, 4 and 2 bits at a threshold, in whole units."""
    losses, weight = section.losses, theta * section.tokens
    levels = (*TIERS, 0)
    cost = torch.stack([losses * NOISE[b] + weight * b for b in levels])
    chosen = torch.tensor(levels)[cost.argmin(0)]
    count, unit = len(losses), unit_of(len(losses))
    edges = [0]
    for b in TIERS:
        upto = int((chosen >= b).sum())
        edges.append(min(max(edges[-1], round(upto / unit) * unit), count // unit * unit))
    return edges[1] - edges[0], edges[2] - edges[1], edges[3] - edges[2]


def allocate(sections: Sequence[Section], bits: int) -> list[Tiers]:
    """Tiers of all sections that together take at most `bits`, summed over their tokens.

    Raises
    ------
    ValueError
        There is no room for a single component.
    """

    def taken(tiers: Sequence[Tiers]) -> int:
        return sum(bits_per_token(tier) * section.tokens for tier, section in zip(tiers, sections, strict=True))

    top = max(float(section.losses.max()) / section.tokens for section in sections)
    low, high = math.log(max(top, 1e-300)) - 60, math.log(max(top, 1e-300)) + 2
    if taken([tiers_at(section, math.exp(low)) for section in sections]) <= bits:
        return [tiers_at(section, math.exp(low)) for section in sections]
    for _ in range(60):
        middle = (low + high) / 2
        fits = taken([tiers_at(section, math.exp(middle)) for section in sections]) <= bits
        low, high = (low, middle) if fits else (middle, high)
    tiers = [tiers_at(section, math.exp(high)) for section in sections]
    if top > 0 and not any(map(sum, tiers)):
        raise ValueError("the budget leaves no room for codes: allow more bytes, or keep fewer tokens exactly")
    return tiers


def expected_loss(section: Section, tiers: Tiers) -> float:
    """Nats per token that rounding these components costs, to second order."""
    edges = [0, tiers[0], tiers[0] + tiers[1], sum(tiers), len(section.losses)]
    return sum(
        NOISE[bits] * float(section.losses[a:b].sum())
        for bits, a, b in zip((*TIERS, 0), edges, edges[1:], strict=False)
    )
