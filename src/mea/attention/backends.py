"""Softmax attention with three backends, chosen by name, without silent fallbacks.

``eager`` is `mea.ops.reference.attend` itself and materialises the scores; ``sdpa`` is PyTorch's fused attention;
``flex`` is FlexAttention, which skips masked blocks and needs `torch.compile` to be fast (on a CPU, forward only).
Tensors are head-major here, as in the fused kernels and Hugging Face's caches.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mea.ops import reference
from mea.ops.masks import attention_mask

Backend = Literal["eager", "sdpa", "flex"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
SHORT_ROW = 256  # up to so many tokens, plain products are faster in training than PyTorch's fused CPU kernel
AttentionMask = Bool[Tensor, "#b 1 t s"] | BlockMask


def attend(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h_kv s d"],
    v: Float[Tensor, "b h_kv s e"],
    mask: AttentionMask | None = None,
    *,
    backend: Backend = "sdpa",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t e"]:
    """Attend with grouped heads; see `mea.ops.reference.attend` for the mathematics.

    Parameters
    ----------
    mask
        True where a query may attend (a `BlockMask` for ``flex``). It replaces `causal` and `window`: build it with
        `mea.ops.masks.attention_mask` or `block_mask`. If None, the queries are the last ``t`` of the ``s`` tokens.
    scale
        Factor of the scores, ``1 / sqrt(d)`` if None.

    Raises
    ------
    TypeError
        The mask has the wrong type for the backend.
    """
    t, s = q.shape[2], k.shape[2]
    if mask is not None and isinstance(mask, BlockMask) != (backend == "flex"):
        needed = "a BlockMask (see mea.attention.backends.block_mask)" if backend == "flex" else "a tensor"
        raise TypeError(f"backend {backend!r} needs {needed} as its mask, not {type(mask).__name__}")
    if backend == "flex":
        block = block_mask(t, s, causal=causal, window=window, device=q.device) if mask is None else mask
        return flex_attention(q, k, v, block_mask=block, scale=scale, enable_gqa=q.shape[1] != k.shape[1])  # pyright: ignore

    # No mask is needed for a single causal query, or for a window that spans all keys.
    narrow = window is not None and window < s
    causal_flag = mask is None and causal and t == s and t > 1 and not narrow
    if mask is None and (narrow or (causal and 1 < t < s)):
        mask = attention_mask(t, s, causal=causal, window=window, device=q.device)
    assert not isinstance(mask, BlockMask)
    if backend == "eager":
        if causal_flag:
            mask = attention_mask(t, s, device=q.device)
        out = reference.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale)
        return out.transpose(1, 2)
    return _sdpa(q, k, v, mask, causal_flag, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    h, h_kv, d, e = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    if d < e:
        # The fused CPU and CUDA kernels need equal head dimensions: zero channels do not change a dot product.
        q, k = F.pad(q, (0, e - d)), F.pad(k, (0, e - d))
    elif d > e:
        v = F.pad(v, (0, d - e))
    if q.shape[2] == 1 and h > h_kv:
        # Decoding: the queries of a group become tokens of one head, so that each key is read once: 4x faster on CPU.
        packed = q.unflatten(1, (h_kv, h // h_kv)).squeeze(3)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
        return out.flatten(1, 2)[:, :, None, :e]
    short = q.shape[2] <= SHORT_ROW and q.dtype != torch.float32  # in fp32 the fused kernel is the faster one
    if causal and short and q.is_cpu and torch.is_grad_enabled() and q.requires_grad:
        return _short_rows(q, k, v, scale)[..., :e]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=h != h_kv)
    return out[..., :e]


def _short_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by plain products, with the queries of a group as rows of one matrix.

    On short rows in bfloat16, a training step of a small model takes two thirds of the time with the fused kernel (on a
    CPU with bfloat16 products). In fp32 it would take 1.4 times as long as the fused kernel (AVX2).
    """
    h, h_kv, t = q.shape[1], k.shape[1], q.shape[2]
    scores = (q * scale).unflatten(1, (h_kv, -1)).flatten(2, 3) @ k.mT
    hidden = torch.full((t, t), -math.inf, dtype=scores.dtype).triu(
        1
    )  # added, because a masked fill has a backward pass
    maps = (scores.unflatten(2, (h // h_kv, t)) + hidden).softmax(-1).to(v.dtype)
    return (maps.flatten(2, 3) @ v).unflatten(2, (h // h_kv, t)).flatten(1, 2)


def block_mask(
    queries: int,
    keys: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    padding: Bool[Tensor, "b s"] | None = None,
    documents: Int[Tensor, "b s"] | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The mask of `mea.ops.masks.attention_mask`, with the same arguments, as FlexAttention's `BlockMask`."""
    keys = queries if keys is None else keys
    offset = keys - queries

    def visible(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + offset
        see = q >= 0
        if causal:
            see = see & (k <= q)
        if window is not None:
            see = see & ((q - k).abs() < window)
        if documents is not None:
            see = see & (documents[b, q] == documents[b, k])
        if padding is not None:
            see = see & (padding[b, k] | (k == q))
        return see

    per_row = next((x for x in (padding, documents) if x is not None), None)
    rows, device = (None, device) if per_row is None else (per_row.shape[0], str(per_row.device))
    # A lambda, because PyTorch counts a mask function's arguments, and a decorated one (a type checker's) hides them.
    return create_block_mask(lambda b, h, q, k: visible(b, q, k), rows, None, queries, keys, device=str(device))
