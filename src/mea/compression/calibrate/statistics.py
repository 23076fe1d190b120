"""Statistics of a layer for the methods: weights, second moments of activations, and attention-averaged values.

Sums run over tokens window by window, so their memory does not grow with the number of tokens. Symbols: ``h`` query
heads, ``g`` kv heads, ``d`` head dimension, ``n = g * d``, ``p`` positions, ``D`` hidden size, ``t`` tokens of a
window.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mea.compression.calibrate.layerwise import LayerInputs
from mea.models.latent_attention import NormedProjection
from mea.ops.cache_forms import FORMS, PostRope

EVERY = 2  # one query in EVERY is used: neighbouring queries attend to similar tokens
BLOCK_NUMBERS = 4096  # rows of the second moment of a block of query heads, at most: 64 MiB


class Projected(NamedTuple):
    """Queries, keys and values of one window; the first two after their norm and before RoPE."""

    queries: Float[Tensor, "h t d"]
    keys: Float[Tensor, "g t d"]
    values: Float[Tensor, "g t d"]


class ScoreMoments(NamedTuple):
    """Second moments before RoPE, weighted by the sensitivity of scores (`calibrate.score_sensitivity`).

    Attributes
    ----------
    keys
        Of the stacked keys of all heads, without the first token of each window, fp64.
    first
        Of the keys of first tokens, which are always at position 0, in the same unit.
    queries
        Summed over the query heads of each group, fp64.
    """

    keys: Float[Tensor, "n n"]
    first: Float[Tensor, "n n"]
    queries: Float[Tensor, "g d d"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer.

    Attributes
    ----------
    keys, values, cross
        ``E[k k^T]``, ``E[v v^T]`` and ``E[k v^T]`` of the stacked heads, fp64; keys before RoPE.
    queries
        ``E[q q^T]`` before RoPE, summed over the query heads of each group, fp64.
    cos, sin
        The rotary embedding at the positions that the model supports.
    key_weight, value_weight
        ``[W | b]`` of the projections; key rows are multiplied by the gain of the key norm, if there is one.
    output
        Metric of errors in the values: ``W_i^T W_i``, summed over the query heads of each group.
    scores
        Moments weighted by score sensitivity, if a method needs them.
    """

    keys: Float[Tensor, "n n"]
    queries: Float[Tensor, "g d d"]
    values: Float[Tensor, "n n"]
    cos: Float[Tensor, "p d"]
    sin: Float[Tensor, "p d"]
    key_weight: Float[Tensor, "n _"]
    value_weight: Float[Tensor, "n _"]
    cross: Float[Tensor, "n n"]
    output: Float[Tensor, "g d d"]
    scores: ScoreMoments | None = None

    @property
    def num_kv_heads(self) -> int:
        """``g``."""
        return self.queries.shape[0]

    @property
    def head_dim(self) -> int:
        """``d``."""
        return self.queries.shape[1]


class AveragedValues(NamedTuple):
    """Second moments of attention-averaged values ``u_i = A_i v``: all kv heads' values, averaged by query head i.

    For a shared latent, ``v`` here is the latent, of ``n`` numbers.

    Query heads form ``c`` blocks of ``m = h / c``; products between blocks are not kept. With one block nothing is left
    out.

    Attributes
    ----------
    gram
        ``E[u_i u_j^T]`` within blocks.
    target
        ``E[u_i y^T]``, with the true output ``y`` of the block's heads after ``W_O``.
    energy
        ``E |y|^2``, summed over blocks.
    output_weight
        ``W_O`` per query head.
    """

    gram: Float[Tensor, "c m n m n"]
    target: Float[Tensor, "c m n D"]
    energy: float
    output_weight: Float[Tensor, "c m D d"]


def project(attention: Any, x: Float[Tensor, "t D"]) -> Projected:
    """Queries, keys and values of an attention module, before RoPE."""
    shape = (x.shape[0], -1, attention.head_dim)
    queries, keys, values = (f(x).view(shape) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    return Projected(queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1))


class StatisticsSum:
    """Adds up `LayerStatistics` window by window."""

    def __init__(self, attention: Any):
        self.attention = attention
        n, d = attention.k_proj.weight.shape[0], attention.head_dim
        self.tokens = 0
        self.keys = attention.k_proj.weight.new_zeros(n, n, dtype=torch.float64)  # sums of products in fp32
        self.values, self.cross = torch.zeros_like(self.keys), torch.zeros_like(self.keys)
        self.queries = self.keys.new_zeros(n // d, d, d)

    def add(self, x: Float[Tensor, "t D"]) -> None:
        """Add a window's attention input."""
        queries, keys, values = project(self.attention, x)
        g, t, d = keys.shape
        keys, values = (heads.transpose(0, 1).reshape(t, g * d) for heads in (keys, values))
        self.keys += keys.T @ keys
        self.values += values.T @ values
        self.cross += keys.T @ values
        rows = queries.reshape(g, -1, d)
        self.queries += rows.transpose(1, 2) @ rows
        self.tokens += t

    def result(self, cos: Float[Tensor, "p d"], sin: Float[Tensor, "p d"]) -> LayerStatistics:
        """The moments so far, with the layer's weights."""
        attention, n = self.attention, self.tokens
        gain = attention.k_proj.weight.new_ones(attention.head_dim)
        if hasattr(attention, "k_norm"):
            # Norms differ in how they store a gain (Gemma: minus one): applied to ones, every norm returns its gain.
            gain = attention.k_norm(gain)
        key_weight = with_bias(attention.k_proj) * gain.repeat(self.queries.shape[0])[:, None]
        g, d, _ = self.queries.shape
        output = attention.o_proj.weight.double().unflatten(1, (g, -1, d))  # heads of a group are adjacent
        return LayerStatistics(
            self.keys / n, self.queries / n, self.values / n, cos, sin,
            key_weight, with_bias(attention.v_proj), self.cross / n, torch.einsum("Dgma,Dgmb->gab", output, output),
        )  # fmt: skip


def with_bias(linear: nn.Linear) -> Float[Tensor, "n _"]:
    """``[W | b]``."""
    weight = linear.weight
    return weight if linear.bias is None else torch.cat([weight, linear.bias[:, None]], dim=1)


def head_scale(attention: Any, heads: Float[Tensor, "t _"]) -> Float[Tensor, "t h 1"]:
    """Factor of a head norm before ``W_O`` for each token and head with outputs `heads`; 1 without a norm."""
    outputs = heads.unflatten(1, (-1, attention.head_dim))
    if not isinstance(attention.o_proj, NormedProjection):
        return torch.ones_like(outputs[..., :1])
    return (outputs.square().mean(-1, keepdim=True) + attention.o_proj.eps).rsqrt()


class AveragedValuesSum:
    """Adds up `AveragedValues` over windows, with the attention maps of the compressed keys.

    Parameters
    ----------
    attention, inputs
        The original module, and the mask and rotary embedding of a window.
    key_projection
        Decoder times encoder of the compressed keys; for a shared latent, the decoder of keys.
    form
        Cache form.
    encoder
        Encoder of a shared latent, from the stacked keys and values of all heads.
    most
        Largest ``m * n`` of a block with more than one query head.
    groups
        Groups of heads; each block has query heads of one group only.
    """

    def __init__(
        self,
        attention: Any,
        inputs: LayerInputs,
        key_projection: Float[Tensor, "n _"],
        form: PostRope = FORMS["post_rope"],
        encoder: Float[Tensor, "r _"] | None = None,
        most: int = BLOCK_NUMBERS,
        groups: int = 1,
    ):
        self.attention, self.inputs, self.key_projection = attention, inputs, key_projection
        self.form, self.encoder = form, encoder
        weight = attention.o_proj.weight
        n, d = key_projection.shape[1], attention.head_dim
        width, h = weight.shape[0], weight.shape[1] // d
        m = max(m for m in range(1, h + 1) if h // groups % m == 0 and (m == 1 or m * n <= most))
        self.output_weight = weight.view(width, h // m, m, d).permute(1, 2, 0, 3)
        self.gram = weight.new_zeros(h // m, m * n, m * n)
        self.target = weight.new_zeros(h // m, m * n, width)
        self.energy = 0.0

    def add(self, x: Float[Tensor, "t D"], heads: Float[Tensor, "t _"], weight: Float[Tensor, " t"]) -> None:
        """Add a window: the attention's input, its uncompressed heads' outputs, and the weight of each token.

        Uses the keys and values of all tokens, and the queries of one token in `EVERY`.
        """
        modelling = sys.modules[type(self.attention).__module__]
        queries, keys, values = project(self.attention, x)
        g, t, d = keys.shape
        c, m = self.output_weight.shape[:2]
        attending = slice(EVERY - 1, None, EVERY)
        cos, sin = self.inputs.position_embeddings
        rotated = modelling.apply_rotary_pos_emb(queries[None], keys[None], cos, sin)
        values = values.transpose(0, 1).reshape(t, g * d)
        encoded = (keys if self.form.pre_rope else rotated[1][0]).transpose(0, 1).reshape(t, g * d)
        if self.encoder is not None:
            encoded = values = torch.cat([encoded, values], dim=1) @ self.encoder.T
        keys = (encoded @ self.key_projection.T).view(t, g, d).transpose(0, 1)
        if self.form.pre_rope:
            keys = modelling.apply_rotary_pos_emb(queries[None], keys[None], cos, sin)[1][0]
        queries, keys = rotated[0], keys[:, None].transpose(2, 3)
        queries, root, heads = queries[0, :, attending], weight[attending].sqrt()[:, None], heads[attending]
        scale = head_scale(self.attention, heads)
        heads = (heads.unflatten(1, (-1, d)) * scale).flatten(1)
        scores = (queries.unflatten(0, (g, -1)) @ keys).flatten(0, 1) * self.attention.scaling
        maps = (scores + self.inputs.mask[0, :, attending]).softmax(dim=-1)
        averaged = maps @ values
        averaged = (averaged.transpose(0, 1) * scale).reshape(len(heads), c, -1).transpose(0, 1) * root
        output = torch.einsum("tcmd,cmod->cto", heads.unflatten(1, (c, m, d)), self.output_weight) * root
        self.gram += averaged.transpose(1, 2) @ averaged
        self.target += averaged.transpose(1, 2) @ output
        self.energy += output.square().sum().item()

    def result(self) -> AveragedValues:
        """The moments so far, scaled so that the energy is 1."""
        c, m = self.output_weight.shape[:2]
        shape, energy = (c, m, self.gram.shape[1] // m), self.energy or 1.0
        return AveragedValues(
            (self.gram / energy).view(*shape, *shape[1:]), (self.target / energy).view(*shape, -1),
            1.0, self.output_weight,
        )  # fmt: skip
