"""What the Triton kernels compute, in PyTorch and in the dtype of the queries: read this first.

A packed cache (`mea.ops.codes`) is read by queries after RoPE. Results are averages of components
and the logarithm of the sum of ``e^score``, so that tokens which are kept exactly can be merged: with log-sum-exps
``a`` and ``b`` of two sets of tokens, the first has the weight ``sigmoid(a - b)``.

Dimensions: ``b`` sequences, ``h`` query heads, ``g`` kv heads, ``q`` new tokens, ``n`` coded tokens, ``d`` channels of
a head, ``r`` components. Channels ``c`` and ``c + d / 2`` are a pair for RoPE.
"""

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor

from mea.ops.codes import Groups, code_bytes, unpack

PLACES = 64  # tokens of a block, whose angles are its first token's plus those of the places in it


class Maps(NamedTuple):
    """How components become keys.

    Attributes
    ----------
    groups
        ``(bits, size)`` of each group of a token's components, in the order of storage.
    key_decoder
        ``[g, d, r]``; with `frequency` the first components are pairs ``(re, im)`` that are rotated without rebuilding
        keys, and it is ``[g, pairs, 2]``, complex numbers.
    key_mean
        ``[g, d]``.
    frequency
        ``[pairs]``, below ``d / 2``.
    """

    groups: Groups
    key_decoder: Tensor
    key_mean: Tensor
    frequency: Tensor | None = None


class CodedTokens(NamedTuple):
    """The tokens that are read: ``begin .. begin + n - 1`` of each sequence.

    Attributes
    ----------
    codes, scales
        ``[b, tokens, bytes]`` and ``[b, tokens, 2 * groups]``, the latter ``low, step`` of each group in bf16. With
        `pages` they are ``[number of pages, tokens of a page, _]``; the kernels need pages of 64, 128, ... tokens.
    hidden
        ``[b, n]``, not 0 where no query reads the token.
    seen
        ``[b, q]``: how many of the ``n`` tokens each new token reads, from the first on; None for all.
    pages
        ``[b, _]``: the pages of each sequence, in the order of its tokens (vLLM's block table, arXiv 2309.06180).
    """

    codes: UInt8[Tensor, "_ _ bytes"]
    scales: BFloat16[Tensor, "_ _ two_groups"]
    begin: int
    n: int
    hidden: UInt8[Tensor, "b n"] | None = None
    seen: Int[Tensor, "b q"] | None = None
    pages: Int[Tensor, "b _"] | None = None


class Angles(NamedTuple):
    """Cosines and sines of the tokens' angles; a factor of attention scaling is in `blocks`.

    Attributes
    ----------
    blocks : [b or 1, ceil(n / 64), d / 2], each
        Angles of the first of every 64 tokens.
    places : [64, d / 2], each
        Angles of the places in a block: a token's angle is the sum of its block's and its place's.
    """

    blocks: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]


def read(
    maps: Maps, queries: Float[Tensor, "b h q d"], tokens: CodedTokens, angles: Angles, scale: float
) -> tuple[Float[Tensor, "b h q r"], Float[Tensor, "b h q"]]:
    """Averages of the components with weights ``softmax(scale * score)``, and the log-sum-exp of ``scale * score``.

    For a query without visible tokens averages are 0 and the log-sum-exp is minus infinity.
    """
    components = decode(maps.groups, tokens).to(queries.dtype)
    grouped = queries.unflatten(1, (len(maps.key_mean), -1))
    score = score_pairs if maps.frequency is not None else score_rebuilt
    scores = scale * score(maps, grouped, components, *token_angles(angles, tokens.n, queries.dtype)).flatten(1, 2)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if tokens.hidden is not None:
        visible &= tokens.hidden[:, None, None] == 0
    if tokens.seen is not None:
        visible &= torch.arange(tokens.n, device=scores.device) < tokens.seen[:, None, :, None]
    log_sum = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
    weights = torch.where(visible, (scores - log_sum[..., None]).exp(), 0)
    # Components of tokens that nobody reads may be anything.
    components = torch.where(visible.any((1, 2))[..., None], components, 0)
    return weights @ components[:, None], log_sum


def decode(groups: Groups, tokens: CodedTokens) -> Float[Tensor, "b n r"]:
    """The components, in fp32."""
    codes, scales = tokens.codes, tokens.scales
    if tokens.pages is not None:
        codes, scales = codes[tokens.pages.long()].flatten(1, 2), scales[tokens.pages.long()].flatten(1, 2)
    codes, scales = (x[:, tokens.begin : tokens.begin + tokens.n] for x in (codes, scales))
    parts, start = [], 0
    for index, (bits, size) in enumerate(groups):
        stop = start + code_bytes(bits, size)
        low, step = scales[..., 2 * index : 2 * index + 2].float().split(1, -1)
        parts.append(low + step * unpack(codes[..., start:stop], bits, size).float())
        start = stop
    return torch.cat(parts, -1)


def token_angles(angles: Angles, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[b or 1, n, d / 2]`` of every token."""
    token = torch.arange(n, device=angles.blocks[0].device)
    c, s = (x.to(dtype)[:, token // PLACES] for x in angles.blocks)
    cos, sin = (x.to(dtype)[token % PLACES] for x in angles.places)
    return c * cos - s * sin, s * cos + c * sin


def absorb(x: Tensor, y: Tensor, numbers: Float[Tensor, "g m 2"]) -> tuple[Tensor, Tensor]:
    """Queries ``x + i y [b, g, _, q, m]`` times the conjugates of complex numbers, as real and imaginary parts."""
    re, im = numbers.to(x.dtype)[:, None, None].unbind(-1)
    return x * re + y * im, y * re - x * im


def score_pairs(maps: Maps, queries: Tensor, components: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Products ``[b, g, h / g, q, n]`` of queries with keys: the components turn, and queries absorb the decoder."""
    assert maps.frequency is not None
    frequency, (x, y) = maps.frequency.long(), queries.chunk(2, -1)
    re, im = components[..., : 2 * len(frequency)].unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., frequency], sin[..., frequency]
    a, b = absorb(x[..., frequency], y[..., frequency], maps.key_decoder)
    # The mean is a component of each frequency that is always 1.
    u, v = absorb(x, y, torch.stack(maps.key_mean.chunk(2, -1), -1))
    keys = torch.cat([re * c - im * s, re * s + im * c, *(t.expand(len(components), -1, -1) for t in (cos, sin))], -1)
    return torch.cat([a, b, u, v], -1) @ keys[:, None, None].mT


def score_rebuilt(maps: Maps, queries: Tensor, components: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Products ``[b, g, h / g, q, n]`` of queries with keys that are rebuilt and turned."""
    keys = components[:, None] @ maps.key_decoder.to(components.dtype).mT + maps.key_mean.to(components.dtype)[:, None]
    (x, y), c, s = keys.chunk(2, -1), cos[:, None], sin[:, None]
    return queries @ torch.cat([x * c - y * s, y * c + x * s], -1)[:, :, None].mT
