"""Grouped-query attention (arXiv 2305.13245), with an optional norm of each head's output.

Multi-head attention is ``num_kv_heads = num_heads``, multi-query attention ``num_kv_heads = 1``. With a head norm it is
the "+GroupNorm" baseline of arXiv 2601.19611, and the folded form of a square `MultiheadExplicitAttention`.
"""

from typing import Unpack

from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.attention.backends import AttentionMask
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.attention.mixing import HeadNormGain, make_head_norm
from mea.ops.rope import Rotary


class GroupedQueryAttention(Attention):
    """Softmax attention in which groups of query heads share a key and value head.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`.
    head_norm
        ``"off"``, or RMSNorm of every head before the output projection with ``"no_gain"``, ``"shared_gain"`` or
        ``"per_head_gain"``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_norm: HeadNormGain = "off",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, **options)
        self.head_norm = make_head_norm(num_heads, self.head_dim, head_norm, self.eps, self.head_norm_init)

    @classmethod
    def like(cls, module: Attention, head_norm: HeadNormGain = "off") -> "GroupedQueryAttention":
        """Grouped attention with the sizes, options, dtype and device of `module`, and weights of its own."""
        plain = cls(
            module.hidden_size,
            module.num_heads,
            module.num_kv_heads,
            head_norm=head_norm,
            head_dim=module.head_dim,
            rope=module.rope,
            qk_norm=not isinstance(module.q_norm, nn.Identity),
            causal=module.causal,
            window=module.window,
            bias=module.q_proj.bias is not None,
            backend=module.backend,
            eps=module.eps,
            layer_index=module.layer_index,
        )
        return plain.to(module.q_proj.weight.device, module.q_proj.weight.dtype).train(module.training)

    def forward(
        self,
        x: Float[Tensor, "b t D"],
        *,
        mask: AttentionMask | None = None,
        positions: Int[Tensor, "#b t"] | Rotary | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t D"]:
        """Attend within `x` and to the tokens in `cache`.

        Parameters
        ----------
        x
            Hidden states of the new tokens.
        mask
            True where a query may attend; None for this module's own `causal` and `window`.
        positions
            Positions of the new tokens, or their rotary angles; None continues from the length of the cache.
        cache
            Cache with the past tokens; the new tokens are appended to it.
        """
        q, k, v = self.project(x, positions, cache)
        return self.output(self.head_norm(self.attend(q, k, v, mask)))
