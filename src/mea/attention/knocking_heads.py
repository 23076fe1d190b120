"""Knocking-heads attention (arXiv 2510.23052), linear: one matrix transforms the queries, keys or values of every head.

The paper's other form, a gated network of two layers on values, does not fold into a projection and is not here.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.attention.backends import AttentionMask
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.attention.gqa import GroupedQueryAttention
from mea.attention.mixing import FeatureMixing, fold_projection
from mea.ops.rope import Rotary


class KnockingHeadsAttention(Attention):
    """Grouped-query attention with matrices ``[d, d]`` that all heads share, between the projections and RoPE.

    The matrices start as the identity, that is, as grouped attention. Where MEA mixes heads by scalars, each the same
    for all channels, this mixes channels by a matrix, the same for all heads.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`. With `qk_norm` the norms come after the matrices, as in the paper.
    on
        What is transformed: letters of ``"qkv"``. The paper finds most of the gain in ``"v"``. ``query_mixing.weight``,
        ``key_mixing.weight`` and ``value_mixing.weight`` are its ``T^Q``, ``T^K`` and ``T^V``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        on: str = "qkv",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, **options)
        if not on or len(set(on)) < len(on) or not set(on) <= set("qkv"):
            raise ValueError(f"on must be letters of 'qkv', each at most once, not {on!r}")
        self.query_mixing, self.key_mixing, self.value_mixing = (
            FeatureMixing(self.head_dim) if letter in on else nn.Identity() for letter in "qkv"
        )

    def forward(
        self,
        x: Float[Tensor, "b t D"],
        *,
        mask: AttentionMask | None = None,
        positions: Int[Tensor, "#b t"] | Rotary | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t D"]:
        """Attend within `x` and to the tokens in `cache`; arguments as in `GroupedQueryAttention.forward`."""
        q = self.q_norm(self.query_mixing(self.heads(self.q_proj(x))))
        k = self.k_norm(self.key_mixing(self.heads(self.k_proj(x))))
        v = self.value_mixing(self.heads(self.v_proj(x)))
        q, k = self.rotate(q, k, positions, cache)
        k, v = self.remember(k, v, cache)
        return self.output(self.attend(q, k, v, mask))

    @torch.no_grad()
    def folded(self, *, expand: bool = False) -> GroupedQueryAttention:
        """The same function as grouped attention, with the matrices inside the projections; `expand` has no effect."""
        plain = GroupedQueryAttention.like(self)
        state = {name: x for name, x in self.state_dict().items() if "_mixing." not in name}
        mixings = {"q_proj": self.query_mixing, "k_proj": self.key_mixing, "v_proj": self.value_mixing}
        for name, mixing in mixings.items():
            if isinstance(mixing, FeatureMixing):
                fold_projection(state, name, mixing)
        plain.load_state_dict(state)
        return plain
