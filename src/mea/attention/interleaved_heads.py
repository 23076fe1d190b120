"""Interleaved-head attention (IHA, arXiv 2602.21371): combinations of all heads as further tokens of each head.

In every head a token becomes ``P`` pseudo-tokens in a row, whose queries, keys and values are combinations of those of
all heads. Causal attention runs once over the ``P t`` pseudo-tokens, and a last combination collapses the ``h P``
outputs of a token to ``h`` heads.

As in the paper, RoPE counts pseudo-tokens, and the order of pseudo-tokens is causal too: pseudo-token ``p`` of a token
sees all those of earlier tokens, and of its own token those up to ``p``. Attention costs ``P²`` times that of grouped
attention. The cache costs nothing more: combinations of heads commute with RoPE, so it holds the heads before they are
combined, rotated by the position of their token's first pseudo-token.

Two things are not from the paper: fewer key and value heads than query heads (the paper has equally many), and the
initial values (the paper gives none). The paper lowers the cost by sliding windows in four of five layers; this is left
to the caller.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mea.attention.backends import AttentionMask, Backend
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.attention.mixing import HeadMixing, MixingInit
from mea.ops.masks import attention_mask, interleave
from mea.ops.rope import Rotary, rotate


class InterleavedHeadAttention(Attention):
    """Grouped-query attention over pseudo-heads, which form a sequence of further tokens.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`.
    num_pseudo_heads
        ``P``, pseudo-heads per head. The paper has ``P = h``.
    init
        Initialisation of the four matrices, by name: see `HeadMixing`. At ``"identity"`` all pseudo-heads of a head are
        copies of it, and their outputs are averaged. ``query_mixing.weight`` ``[h, h P]``, ``key_mixing.weight`` and
        ``value_mixing.weight`` ``[h_kv, h_kv P]`` are the paper's alpha, ``collapse.weight`` ``[h P, h]`` is the
        transpose of its R.
    """

    backends: tuple[Backend, ...] = ("eager", "sdpa")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        num_pseudo_heads: int = 2,
        init: MixingInit = "identity",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, **options)
        if num_pseudo_heads < 1:
            raise ValueError(f"num_pseudo_heads must be at least 1, not {num_pseudo_heads}")
        self.num_pseudo_heads = p = num_pseudo_heads
        self.query_mixing = HeadMixing(num_heads, num_heads * p, init)
        self.key_mixing = HeadMixing(self.num_kv_heads, self.num_kv_heads * p, init)
        self.value_mixing = HeadMixing(self.num_kv_heads, self.num_kv_heads * p, init)
        self.collapse = HeadMixing(num_heads * p, num_heads, init)

    def forward(
        self,
        x: Float[Tensor, "b t D"],
        *,
        mask: AttentionMask | None = None,
        positions: Int[Tensor, "#b t"] | Rotary | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t D"]:
        """Attend within `x` and to the tokens in `cache`; arguments as in `GroupedQueryAttention.forward`.

        Angles given as `positions` are those of this module's `rotary`. A `mask` given to a causal module is causal:
        the last key that a query may attend to is the query's own token.
        """
        q, k, v = self.project(x, positions, cache)
        t, s = x.shape[1], k.shape[2]
        if mask is None and self.window is not None:
            mask = attention_mask(t, s, causal=self.causal, window=self.window, device=x.device)
        if isinstance(mask, BlockMask):
            raise TypeError("interleaved-head attention needs a tensor as its mask, not a BlockMask")
        if mask is not None:
            mask = interleave(mask, self.num_pseudo_heads, causal=self.causal)
        q = self._turned(self._interleaved(q, self.query_mixing))
        k = self._turned(self._interleaved(k.transpose(1, 2), self.key_mixing)).transpose(1, 2)
        v = self._interleaved(v.transpose(1, 2), self.value_mixing).transpose(1, 2)
        out = self.attend(q, k, v, mask).unflatten(1, (t, -1))
        return self.output(self.collapse(out.transpose(2, 3).flatten(2, 3)))

    def rotary(self, positions: Int[Tensor, "#b t"], dtype: torch.dtype) -> Rotary:
        """Angles of the first pseudo-tokens of tokens at `positions`: those of position ``P`` times as large."""
        return super().rotary(positions * self.num_pseudo_heads, dtype)

    def _interleaved(self, x: Float[Tensor, "b t n d"], mixing: HeadMixing) -> Float[Tensor, "b p_t n d"]:
        """The pseudo-heads of all tokens as tokens in a row."""
        return mixing(x).unflatten(2, (-1, self.num_pseudo_heads)).transpose(2, 3).flatten(1, 2)

    def _turned(self, x: Float[Tensor, "b p_t n d"]) -> Float[Tensor, "b p_t n d"]:
        """Pseudo-tokens, so far at the position of the first of their token, rotated to their own."""
        if self.rope is None:
            return x
        places = torch.arange(x.shape[1], device=x.device) % self.num_pseudo_heads
        return rotate(x, super().rotary(places[None], x.dtype))
