"""New tokens of many requests read the pages of a packed cache together, whatever the requests' lengths.

Every new token is a sequence of its own, with the block tables of its request. Which tokens it reads stands in tensors:
nothing waits for the device, and kernels are launched once for all.

Dimensions as in `mea.ops.latent`; ``b`` new tokens, ``e`` first and newest tokens, which are read exactly.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mea.models.coded_attention import CodedAttention
from mea.ops import triton as gpu
from mea.ops.codes import wide
from mea.ops.triton import Angles, CodedTokens, reference


class Rows(NamedTuple):
    """What all layers share of a step; made by `PagedCodedAttention.rows`.

    Attributes
    ----------
    count
        Coded tokens of the longest request, at least 1: host and kernels count up to it.
    seen, hidden, pages
        As in `mea.ops.triton.reference.CodedTokens`: the tokens before the newest ones, without the first ones.
    exact, exact_seen
        Page and place of each exact token, and whether there is one.
    turn, exact_turn
        Cosines and sines of the new tokens' positions, and of the exact tokens'.
    angles
        Of coded tokens.
    """

    count: int
    seen: Int[Tensor, "b 1"]
    hidden: UInt8[Tensor, "b count"]
    pages: Int[Tensor, "b _"]
    exact: tuple[Int[Tensor, "b e"], Int[Tensor, "b e"]]
    exact_seen: Bool[Tensor, "b e"]
    turn: tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b 1 d"]]
    exact_turn: tuple[Float[Tensor, "b e f"], Float[Tensor, "b e f"]]
    angles: Angles


class PagedCodedAttention(CodedAttention):
    """Attention over pages; a class with it has the attributes of the stock modules that `CodedAttention` uses."""

    def rows(
        self, positions: Int[Tensor, " b"], longest: int, tables: tuple[Int[Tensor, "b _"], Int[Tensor, "b _"]],
        exact_block: int,
    ) -> Rows:  # fmt: skip
        """What new tokens at these positions read.

        Parameters
        ----------
        longest
            No request has more tokens, new ones included.
        tables
            Pages of codes and of exact tokens of each new token's request, in the order of its tokens.
        exact_block
            Tokens of a page of exact tokens.
        """
        (first, recent), device, half = self.exact, positions.device, self.head_dim // 2
        count, new = max(1, longest - recent), positions[:, None]
        newest = new - torch.arange(recent - 1, -1, -1, device=device)
        slots = torch.cat([torch.arange(first, device=device).expand(len(new), -1), newest], 1)
        there = torch.cat([slots[:, :first] <= new, newest >= first], 1)
        slots = torch.where(there, slots, new)  # what is not there may be anything, and must be a number
        like = torch.empty(0, device=device)
        exact_turn = [x[..., :half] for x in self._rotary_at(slots, like)]
        return Rows(
            count,
            (new + 1 - recent).clamp_min(0).int(),
            (torch.arange(count, device=device) < first).to(torch.uint8).repeat(len(new), 1),
            tables[0].int().contiguous(),
            (tables[1].gather(1, slots // exact_block), slots % exact_block),
            there,
            self._rotary_at(new, like),
            (exact_turn[0], exact_turn[1]),
            Angles(*self._angles(torch.zeros(1, 1, dtype=torch.long, device=device), count)),
        )

    def read_rows(
        self, queries: Float[Tensor, "b h d"], parts: tuple[Tensor, ...], rows: Rows
    ) -> Float[Tensor, "b h d"]:
        """Attention of new tokens, whose keys and values are in the pages already.

        Parameters
        ----------
        queries
            Before RoPE.
        parts
            Pages ``[pages, tokens, _]`` of codes, scales, exact keys before RoPE and exact values.
        """
        codes, scales, keys, values = parts
        turned = self._turned(wide(queries)[:, :, None], rows.turn)
        tokens = CodedTokens(codes, scales, 0, rows.count, rows.hidden, rows.seen, rows.pages)
        if self._gpu_fits(turned, codes):
            average, weight = self.code.reader(gpu.PackedReader).read(turned, tokens, rows.angles, self.scaling)
        else:
            maps = reference.Maps(
                self.code.groups, self.code.key_decoder, self.code.key_mean, getattr(self.code, "frequency", None)
            )
            average, weight = reference.read(maps, turned, tokens, rows.angles, self.scaling)
        keys, values = (x[rows.exact].unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in (keys, values))
        return self._joined(turned, keys, values, rows.exact_turn, average[:, :, 0], weight[:, :, 0], rows.exact_seen)
