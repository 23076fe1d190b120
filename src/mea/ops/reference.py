"""The attention family in plain tensor algebra: read this file first.

Everything is a pure function of tensors, with no parameters, caches, positions or precision policy, and every score
matrix is materialised. Fast implementations live in `mea.attention` and are tested against these functions.

======  ==========================================================  ======  ===============================
``b``   batch                                                       ``h``       query heads
``t``   query tokens                                                ``h_kv``    key and value heads
``s``   key tokens                                                  ``h_c``     component heads (cached)
``d``   head dimension of queries and keys                          ``p, n``    pairs d / 2, pseudo-heads
``e``   head dimension of values                                    ``r, f``    latent width, frequencies
======  ==========================================================  ======  ===============================

Query heads read key heads in groups (GQA, arXiv 2305.13245): query head ``i`` reads key head ``G(i) = i // (h /
h_kv)``. Rotary embedding, where there is one, has been applied to ``q`` and ``k`` already (`mea.ops.rope`): it acts on
every head alike, so it does not matter whether heads are mixed before or after. Masks are true where a query may
attend.
"""

import math

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from mea.ops.rope import from_complex, to_complex

Mask = Bool[Tensor, "#b #h t s"]


def hlc(x: Float[Tensor, "b t h_c d"], w: Float[Tensor, "h_c h_kv"]) -> Float[Tensor, "b t h_kv d"]:
    """Head-level linear combination (arXiv 2601.19611): one scalar ``W_lc[c, g]`` per pair of heads."""
    return torch.einsum("btcd,cg->btgd", x, w)


def frequency_hlc(
    x: Float[Tensor, "b t h_c d"], w: Complex[Tensor, "p h_c h_kv"], rotary_dim: int | None = None
) -> Float[Tensor, "b t h_kv d"]:
    """One *complex* number per pair of heads and frequency: it commutes with RoPE, which is complex multiplication."""
    z = to_complex(x, rotary_dim)
    return from_complex(torch.einsum("btcp,pcg->btgp", z, w.to(z.dtype)), rotary_dim)


def head_norm(
    x: Float[Tensor, "b t h e"], gain: Float[Tensor, " e"] | Float[Tensor, "h e"] | None = None, eps: float = 1e-5
) -> Float[Tensor, "b t h e"]:
    """RMSNorm over the channels of each token and head (the paper's GroupNorm), gain shared or per head or absent."""
    unit = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return unit if gain is None else unit * gain


def scores(
    q: Float[Tensor, "b t h d"], k: Float[Tensor, "b s h_kv d"], scale: float | None = None
) -> Float[Tensor, "b h t s"]:
    """Scaled dot products of every query with every key of its group's head; `scale` is ``1 / sqrt(d)`` if None."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bthd,bshd->bhts", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def softmax(logits: Float[Tensor, "b h t s"], mask: Mask | None) -> Float[Tensor, "b h t s"]:
    """Attention maps; masked positions get weight 0."""
    return (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(dim=-1)


def read(maps: Float[Tensor, "b h t s"], v: Float[Tensor, "b s h_kv e"]) -> Float[Tensor, "b t h e"]:
    """Average the values of each head's group under its attention map."""
    return torch.einsum("bhts,bshe->bthe", maps, v.repeat_interleave(maps.shape[1] // v.shape[2], dim=2))


def attend(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s h_kv d"],
    v: Float[Tensor, "b s h_kv e"],
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b t h e"]:
    """Softmax attention: MHA (h_kv = h), GQA, MQA (h_kv = 1; arXiv 1706.03762, 2305.13245, 1911.02150)."""
    return read(softmax(scores(q, k, scale), mask), v)


def mea(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s h_c d"],
    v: Float[Tensor, "b s h_c e"],
    w_k: Float[Tensor, "h_c h_kv"],
    w_v: Float[Tensor, "h_c h_kv"],
    gain: Float[Tensor, " e"] | Float[Tensor, "h e"] | None = None,
    mask: Mask | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "b t h e"]:
    """Multi-head explicit attention (arXiv 2601.19611): component heads are recombined, read, and normalised.

    `w_k`, `w_v` are the paper's ``W_lc^K``, ``W_lc^V``. Without the norm it is `modified_talking_heads`.
    """
    return head_norm(attend(q, hlc(k, w_k), hlc(v, w_v), mask), gain, eps)


def knock(x: Float[Tensor, "b t h d"], w: Float[Tensor, "d d"]) -> Float[Tensor, "b t h d"]:
    """Knocking-heads attention (arXiv 2510.23052): the paper's ``T``, one matrix for the channels of every head."""
    return torch.einsum("bthd,de->bthe", x, w)


def talking_heads(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s h_kv d"],
    v: Float[Tensor, "b s h_kv e"],
    t_qk: Float[Tensor, "h h"],
    t_v: Float[Tensor, "h h"],
    mask: Mask | None = None,
) -> Float[Tensor, "b t h e"]:
    """Talking-heads attention (arXiv 2003.02436): heads mix their scores before, and their maps after, the softmax.

    `t_qk`, `t_v` are output × input: row ``i`` holds the weights that make head ``i``. The mask comes between mixing
    and softmax.
    """
    maps = softmax(torch.einsum("ij,bjts->bits", t_qk, scores(q, k)), mask)
    return read(torch.einsum("ij,bjts->bits", t_v, maps), v)


def modified_talking_heads(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s h_kv d"],
    v: Float[Tensor, "b s h_kv e"],
    t_qk: Float[Tensor, "h_kv h_kv"],
    t_v: Float[Tensor, "h_kv h_kv"],
    mask: Mask | None = None,
) -> Float[Tensor, "b t h e"]:
    """The mixing moved onto keys and values (arXiv 2601.19611): output × input matrices; no n × n map is mixed."""
    return attend(q, hlc(k, t_qk.mT), hlc(v, t_v.mT), mask)


def differential_v1(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s h_kv d"],
    v: Float[Tensor, "b s h_kv e"],
    lam: Float[Tensor, ""] | float,
    mask: Mask | None = None,
) -> Float[Tensor, "b t pairs 2*e"]:
    """Differential attention (arXiv 2410.05258) before its norm: the difference of two maps reads a double value head.

    Heads ``2 m`` and ``2 m + 1`` (from 0) of queries, keys and values make pair ``m``; `lam` is the paper's lambda.
    """
    double = torch.cat([v[:, :, 0::2], v[:, :, 1::2]], dim=-1)
    first = softmax(scores(q[:, :, 0::2], k[:, :, 0::2]), mask)
    second = softmax(scores(q[:, :, 1::2], k[:, :, 1::2]), mask)
    return read(first - lam * second, double)


def differential_lambda(
    q1: Float[Tensor, " d"], k1: Float[Tensor, " d"], q2: Float[Tensor, " d"], k2: Float[Tensor, " d"], layer: int
) -> Float[Tensor, ""]:
    """``exp(q1·k1) - exp(q2·k2) + lambda_init``, one number for all heads of a layer; layers count from 0."""
    return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + differential_lambda_init(layer)


def differential_lambda_init(layer: int) -> float:
    """The paper's lambda_init, ``0.8 - 0.6 exp(-0.3 layer)``."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def differential_v2(
    q: Float[Tensor, "b t twice_h d"],
    k: Float[Tensor, "b s h_kv d"],
    v: Float[Tensor, "b s h_kv e"],
    gate: Float[Tensor, "b t h"],
    mask: Mask | None = None,
) -> Float[Tensor, "b t h e"]:
    """Differential attention, second version: query heads 2 m and 2 m + 1 share a group, the latter is subtracted.

    `gate` is ``sigmoid(x W_lambda)``, per token and head. No norm and no lambda_init.
    """
    heads = attend(q, k, v, mask)
    return heads[:, :, 0::2] - gate[..., None] * heads[:, :, 1::2]


def pseudo_heads(x: Float[Tensor, "b t h_c d"], w: Float[Tensor, "h_c h n"]) -> Float[Tensor, "b t n h d"]:
    """The paper's alpha: in place of each head, n combinations of all heads, each to be a token of its own."""
    return torch.einsum("btcd,chn->btnhd", x, w)


def interleaved(
    q: Float[Tensor, "b t n h d"],
    k: Float[Tensor, "b s n h_kv d"],
    v: Float[Tensor, "b s n h_kv e"],
    r: Float[Tensor, "h n h_out"],
    mask: Bool[Tensor, "#b #h n*t n*s"] | None = None,
) -> Float[Tensor, "b t h_out e"]:
    """Interleaved-head attention (arXiv 2602.21371): pseudo-heads attend as tokens in a row; `r` collapses them."""
    heads = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask).unflatten(1, q.shape[1:3])
    return torch.einsum("btnhe,hno->btoe", heads, r)


def gated(heads: Float[Tensor, "b t h e"], logits: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
    """Gated attention (arXiv 2505.06708): the output of attention, scaled channel by channel; ``logits = x W_gate``."""
    return heads * logits.sigmoid()
