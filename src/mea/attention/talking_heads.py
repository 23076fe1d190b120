"""Talking-heads attention (arXiv 2003.02436), as published and as MEA's paper modifies it (arXiv 2601.19611)."""

from typing import Unpack

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mea.attention.backends import AttentionMask, Backend
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.attention.mea import Fold, MultiheadExplicitAttention
from mea.attention.mixing import HeadMixing, MixingInit
from mea.ops import reference
from mea.ops.masks import attention_mask
from mea.ops.rope import Rotary


class TalkingHeadsAttention(Attention):
    """Heads mix their scores before the softmax and their attention maps after it.

    The score matrices of all heads must exist at once, ``b h t s`` numbers several times over: memory grows with the
    square of the context, and ``"eager"`` is the only backend (no fused kernel mixes heads).

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`; the mixing is among the ``h`` query heads whatever the grouping.
    init
        Initialisation of both matrices, by name: see `HeadMixing`. ``score_mixing.weight`` is the transpose of the
        paper's ``T^QK``.
    """

    backends: tuple[Backend, ...] = ("eager",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        init: MixingInit = "identity",
        **options: Unpack[AttentionOptions],
    ) -> None:
        options.setdefault("backend", "eager")
        super().__init__(hidden_size, num_heads, num_kv_heads, **options)
        self.score_mixing = HeadMixing(num_heads, num_heads, init)
        self.map_mixing = HeadMixing(num_heads, num_heads, init)

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
        if mask is None:
            mask = attention_mask(q.shape[1], k.shape[2], causal=self.causal, window=self.window, device=x.device)
        if isinstance(mask, BlockMask):
            raise TypeError("talking-heads attention needs a tensor as its mask, not a BlockMask")
        t_qk, t_v = self.score_mixing.weight.mT, self.map_mixing.weight.mT
        out = reference.talking_heads(q, k.transpose(1, 2), v.transpose(1, 2), t_qk, t_v, mask)
        return self.output(out)


class ModifiedTalkingHeadsAttention(MultiheadExplicitAttention):
    """The mixing moved from scores and maps onto keys and values: exactly MEA without its norm, under its own name.

    ``key_mixing.weight`` is the transpose of the paper's ``T^QK``, ``value_mixing.weight`` that of ``T^V``, both of
    ``[h_kv, h_kv]``. Parameters as in `MultiheadExplicitAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        init: MixingInit = "identity",
        fold: Fold = "auto",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_norm="off", init=init, fold=fold, **options)
