"""Differential attention: two attention maps subtracted. Version 1 (arXiv 2410.05258), and its authors' version 2.

Both call standard softmax attention and subtract its outputs, which equals subtracting the maps without building them.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.attention.backends import AttentionMask
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.attention.mixing import HeadNorm
from mea.ops import reference
from mea.ops.rope import Rotary


class DifferentialAttention(Attention):
    """Version 1: pairs of heads, a learnt lambda per layer, values of twice the dimension, a norm per pair.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`, counted in single heads as in a plain Transformer of the same size: ``num_heads / 2`` pairs
        (the paper's h) read ``num_kv_heads / 2`` pairs of keys and values. Both must be even. `layer_index`, from 0,
        sets lambda_init.

    Notes
    -----
    Query head ``2 m`` reads key head ``2 g`` and ``2 m + 1`` reads ``2 g + 1``, where ``g`` is the group of pair ``m``,
    as in the paper's formulas and its fused implementation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, **options)
        if num_heads % 2 or self.num_kv_heads % 2:
            raise ValueError(
                f"heads come in pairs: num_heads ({num_heads}) and num_kv_heads ({self.num_kv_heads}) must be even"
            )
        self.lambda_init = reference.differential_lambda_init(self.layer_index)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(self.head_dim)) for _ in range(4)
        )
        self.head_norm = HeadNorm(num_heads // 2, 2 * self.head_dim, "shared_gain", self.eps, self.head_norm_init)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the four vectors of lambda as in the paper."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def forward(
        self,
        x: Float[Tensor, "b t D"],
        *,
        mask: AttentionMask | None = None,
        positions: Int[Tensor, "#b t"] | Rotary | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t D"]:
        """Attend within `x` and to the tokens in `cache`; arguments as in `GroupedQueryAttention.forward`."""
        q, k, v = self.project(x, positions, cache)
        first, second = self._read_halves(q, k, v, mask) if q.shape[1] == 1 else self._read_doubles(q, k, v, mask)
        out = first - self.lam().to(x.dtype) * second
        return self.output(self.head_norm(out) * (1.0 - self.lambda_init))

    def _read_doubles(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> tuple[Tensor, Tensor]:
        """The outputs of the first and the second map of every pair, in one call.

        Heads are (pair group g, pair in group i, map j). A kernel needs the query heads of one key head (g, j) to be
        adjacent, and each key head needs its pair's value of twice the dimension.
        """
        pairs = self.num_kv_heads // 2
        q = q.unflatten(2, (pairs, -1, 2)).transpose(3, 4).flatten(2, 4)
        double = torch.cat([v[:, 0::2], v[:, 1::2]], dim=-1).repeat_interleave(2, dim=1)
        first, second = self.attend(q, k, double, mask).unflatten(2, (pairs, 2, -1)).unbind(3)
        return first.flatten(2, 3), second.flatten(2, 3)

    def _read_halves(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> list[Tensor]:
        """The same in four calls on views: for a single query, copying the cache would take most of the time."""
        return [
            torch.cat([self.attend(q[:, :, j::2], k[:, j::2], v[:, e::2], mask) for e in (0, 1)], dim=-1)
            for j in (0, 1)
        ]

    def lam(self) -> Float[Tensor, ""]:
        """The current value of lambda, in fp32 or higher precision."""
        vectors = (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        wide = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        return reference.differential_lambda(*(x.to(wide) for x in vectors), layer=self.layer_index)


class DifferentialAttentionV2(Attention):
    """Version 2: twice the query heads over the same key/value heads, a lambda per token and head, no norm.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`. There are ``2 num_heads`` query heads for `num_heads` outputs, so the query projection is
        twice as wide as a plain Transformer's.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        h_kv = num_heads if num_kv_heads is None else num_kv_heads
        super().__init__(hidden_size, num_heads, h_kv, projections=(2 * num_heads, h_kv, h_kv), **options)
        self.lambda_proj = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b t D"],
        *,
        mask: AttentionMask | None = None,
        positions: Int[Tensor, "#b t"] | Rotary | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t D"]:
        """Attend within `x` and to the tokens in `cache`; arguments as in `GroupedQueryAttention.forward`."""
        q, k, v = self.project(x, positions, cache)
        heads = self.attend(q, k, v, mask)
        gate = self.lambda_proj(x).sigmoid()[..., None]
        return self.output(heads[:, :, 0::2] - gate * heads[:, :, 1::2])
