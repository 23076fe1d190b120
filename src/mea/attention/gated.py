"""Gated attention (arXiv 2505.06708): a sigmoid gate between softmax attention and the output projection.

It is the gate that the paper finds best: its position G1, for every channel of every head, multiplicative.
"""

from typing import Unpack

from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.attention.backends import AttentionMask
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.ops import reference
from mea.ops.rope import Rotary


class GatedAttention(Attention):
    """Grouped-query attention whose output is scaled by ``sigmoid(x W_gate)``.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`. ``gate_proj`` is the paper's ``W_theta``, ``[h d, D]``, without bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, **options)
        self.gate_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)

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
        return self.output(reference.gated(self.attend(q, k, v, mask), self.heads(self.gate_proj(x))))
