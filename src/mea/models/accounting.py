"""Parameters, floating-point operations and cache bytes of a configuration, without creating weights.

Operations are those of matrix products, two per multiplication and addition, as usual; norms, activations and softmax
are not counted. Attention counts the whole ``t × s`` score matrix: causality saves up to half of it in kernels that
skip masked blocks. Each function is tested against a count on a real model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mea.attention.mea import folding_is_cheaper
from mea.attention.mixing import FeatureMixing, FrequencyMixing, HeadMixing
from mea.models.config import MeaConfig
from mea.models.decoder import build_attention


@dataclass(frozen=True)
class _Heads:
    """Numbers of heads in one layer, and the additions of the method to grouped attention."""

    query: int  # heads of the query projection
    key: int  # heads of the key and value projections, which are also what is cached
    value: int
    mixed_keys: bool
    mixed_values: bool
    frequency: bool
    shared: bool  # values are mixed from the components of keys, and have no projection
    pseudo: int  # pseudo-heads per head of interleaved-head attention, which combines heads in every pass; else 0
    knocked: int  # of queries, keys and values together, those whose channels a shared matrix mixes
    gate: int  # outputs of projections of the hidden states besides q, k, v and output
    parameters: int  # of the whole layer's attention


def _heads(config: MeaConfig) -> _Heads:
    """Counts from one layer's attention on the meta device: a new method needs no entry here."""
    with torch.device("meta"):
        attention = build_attention(config, 0)
    usual = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    width = config.hidden_size * attention.head_dim
    query, key, value, _ = (0 if projection is None else projection.weight.numel() // width for projection in usual)
    others = [module for module in attention.modules() if isinstance(module, nn.Linear) and module not in usual]
    mixings = [getattr(attention, f"{name}_mixing", None) for name in ("query", "key", "value")]
    knocked = sum(heads for heads, x in zip((query, key, value), mixings, strict=True) if isinstance(x, FeatureMixing))
    _, key_mixing, value_mixing = mixings
    pseudo = getattr(attention, "num_pseudo_heads", 0)
    return _Heads(
        query,
        key,
        value,
        mixed_keys=isinstance(key_mixing, HeadMixing | FrequencyMixing) and not pseudo,
        mixed_values=isinstance(value_mixing, HeadMixing) and not pseudo,
        frequency=isinstance(key_mixing, FrequencyMixing),
        shared=getattr(attention, "share_components", False),
        pseudo=pseudo,
        knocked=knocked,
        gate=sum(projection.out_features for projection in others),
        parameters=sum(parameter.numel() for parameter in attention.parameters()),
    )


def parameters(config: MeaConfig) -> int:
    """Number of parameters, embeddings included; a tied output projection counts once."""
    width = config.hidden_size
    layer = _heads(config).parameters + 3 * width * config.intermediate_size + 2 * width
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + width


def cache_bytes_per_token(config: MeaConfig, bytes_per_number: int = 2) -> int:
    """Cache bytes per token of one sequence, all layers together."""
    heads = _heads(config)
    return config.num_hidden_layers * (heads.key + heads.value) * (config.head_dim or 0) * bytes_per_number


def cached_share(config: Any) -> float:
    """A model's cache relative to grouped attention with the same number of key/value heads; 1 for other models."""
    if config.model_type != MeaConfig.model_type:
        return 1.0
    heads = _heads(config)
    return (heads.key + heads.value) / (2 * (config.num_key_value_heads or 1))


def training_flops(config: MeaConfig, batch: int, tokens: int) -> int:
    """Operations of one training step without recomputation: the backward pass counts twice the forward pass."""
    n = batch * tokens
    layer = _dense(config, n) + _keys_values(config, n) + batch * _attention(config, tokens, tokens)
    return 3 * (config.num_hidden_layers * layer + 2 * n * config.hidden_size * config.vocab_size)


def decode_flops(config: MeaConfig, context: int) -> int:
    """Operations of generating one token of one sequence when `context` tokens, itself included, are in the cache."""
    heads, d = _heads(config), config.head_dim or 0
    h, h_kv = config.num_attention_heads, config.num_key_value_heads or 1
    h_c, read = heads.key if heads.shared else min(heads.key, heads.value), _attention(config, 1, context)
    components = 2 * config.hidden_size * (heads.key + heads.value) * d
    if h_c == h_kv and not heads.shared:
        attention = _keys_values(config, 1) + read
    elif heads.mixed_keys and heads.mixed_values:
        # Absorbed: queries and outputs have the dimension of all components together; the mixing follows.
        attention = components + h_c * read + 2 * h * h_c * d
    else:
        attention = components + read + 2 * context * h_c * h_kv * d * (2 if heads.frequency else 1)
    return config.num_hidden_layers * (_dense(config, 1) + attention) + 2 * config.hidden_size * config.vocab_size


def _dense(config: MeaConfig, n: int) -> int:
    """The projections of queries and output, the feed-forward layer, and further products of the method per token."""
    heads, d, h = _heads(config), config.head_dim or 0, config.num_attention_heads
    projections = config.hidden_size * ((heads.query + h) * d + 3 * config.intermediate_size + heads.gate)
    return 2 * n * (projections + heads.knocked * d * d)


def _keys_values(config: MeaConfig, n: int) -> int:
    """Projections of keys and values and their mixing, without a cache of components."""
    heads, d, h_kv, width = _heads(config), config.head_dim or 0, config.num_key_value_heads or 1, config.hidden_size
    options = config.attention_options or {}
    values = heads.key if heads.shared else heads.value
    h_c, fold, total = min(heads.key, values), options.get("fold", "auto"), 0
    cheaper = folding_is_cheaper(n, width, h_c, h_kv)
    # A norm between components and mixing, as there is for fewer or shared key components, keeps the two apart.
    apart = bool(options.get("qk_norm")) and (h_c < h_kv or heads.shared)
    for count, mixed, real, folds in (
        (heads.key, heads.mixed_keys, 4 if heads.frequency else 2, not apart),
        (values, heads.mixed_values, 2, True),
    ):
        if mixed and folds and (fold == "always" or (fold == "auto" and cheaper)):
            total += real * count * h_kv * d * (width + config.attention_bias) + 2 * n * width * h_kv * d
        else:
            total += 2 * n * width * count * d + (real * n * count * h_kv * d if mixed else 0)
    return total


def _attention(config: MeaConfig, t: int, s: int) -> int:
    """Scores and weighted sums of one sequence with `t` queries and `s` keys, at the dimension of one head.

    Methods that do more than softmax attention per token pair are listed by name here.
    """
    heads, d, h = _heads(config), config.head_dim or 0, config.num_attention_heads
    score = read = d
    if config.attention == "differential_v1":
        # Values have twice the dimension. A single query reads their halves in two calls, each with its own scores.
        score, read = (2 * d if t == 1 else d), 2 * d
    mixing = 2 * 2 * h * h if config.attention == "talking_heads" else 0
    # Combinations of all heads: queries and outputs, and keys and values of every token, cached ones included.
    combining = 2 * heads.pseudo * d * (2 * t * h * h + s * (heads.key**2 + heads.value**2))
    return t * s * max(heads.pseudo, 1) ** 2 * (2 * heads.query * (score + read) + mixing) + combining


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU per second, from NVIDIA's data sheets (SXM boards, dense products)."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes a second
    products: float  # operations of bf16 matrix products
    vector: float  # fp32 or integer instructions of single lanes: half of the fp32 operations, a fused one being two


GPUS = {
    "H100": Gpu("H100", 80e9, 3.35e12, 989e12, 33.5e12),
    "H200": Gpu("H200", 141e9, 4.8e12, 989e12, 33.5e12),
    "B200": Gpu("B200", 180e9, 8e12, 2250e12, 37.5e12),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that determine its decoding speed."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: float


LLAMAS = {
    "8B": Shape("Llama-3-8B", 32, 32, 8, 128, 8.03e9),  # arXiv 2407.21783, table 3
    "70B": Shape("Llama-3-70B", 80, 64, 8, 128, 70.6e9),
}

# Lane instructions by which a kernel gets at a code: shift, mask, conversion to fp32, and either a fused multiply-add
# or the conversion to bf16.
UNPACK = 4
# By which it turns a component: the token's angle from two angles (4 for a pair), the turn (4), conversion to bf16 (2).
TURN = 5
ROWS = 32  # queries that share what is unpacked: a tile of the Triton kernels
CHUNK = 32  # of each half of a key, that the Triton kernel rebuilds at a time: it unpacks codes again for each


@dataclass(frozen=True)
class Reading:
    """Work of one layer per cached token when one new token reads the cache, without weights and outputs.

    ``stored`` are the token's bytes in the cache, ``moved`` the bytes moved to read it, ``products`` operations of
    matrix products, ``vector`` instructions per lane. Softmax is not counted.
    """

    stored: int | float
    moved: int | float
    products: int | float
    vector: int | float

    def seconds(self, gpu: Gpu) -> float:
        """Lower bound: memory, matrix products and vector instructions overlap, and the slowest determines the time."""
        return max(self._times(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        """The limit of the lower bound: ``memory``, ``products`` or ``unpacking``."""
        times = self._times(gpu)
        return max(times, key=lambda name: times[name])

    def _times(self, gpu: Gpu) -> dict[str, float]:
        return {
            "memory": self.moved / gpu.bandwidth,
            "products": self.products / gpu.products,
            "unpacking": self.vector / gpu.vector,
        }


def plain_reading(shape: Shape, bits: int = 16, scale_bits: int | float = 0) -> Reading:
    """A cache of keys and values with `bits` each and `scale_bits` for scales; below 16 they are unpacked once."""
    numbers = 2 * shape.kv_heads * shape.head_dim
    stored = numbers * (bits + scale_bits) / 8
    return Reading(stored, stored, 4 * shape.heads * shape.head_dim, 0 if bits == 16 else UNPACK * numbers)


def predictive_reading(shape: Shape, keep: float, components: float, keys: float) -> Reading:
    """A packed cache of `keep` of the bytes of bf16, read by the Triton kernels.

    `components` and `keys` are the numbers of all components and of those of keys, relative to keys and values
    together. Codes of keys are read twice, and bf16 weights of all heads are written and read; caches on the chip are
    taken to serve what further tiles of queries read.
    """
    numbers = 2 * shape.kv_heads * shape.head_dim
    stored, r, r_k, h = 2 * keep * numbers, components * numbers, keys * numbers, shape.heads
    moved = stored * (1 + keys / components) + 4 * h
    products = 2 * h * (r_k + shape.head_dim) + 2 * h * r
    return Reading(stored, moved, products, -(-h // ROWS) * (UNPACK * (r + r_k) + TURN * r_k))


def joint_reading(shape: Shape, keep: float, components: float) -> Reading:
    """As `predictive_reading`, with keys rebuilt from all components.

    Each kv head's program unpacks all codes for every `CHUNK` channels of the halves of its keys; caches on the chip
    are taken to serve all but the first reading.
    """
    numbers = 2 * shape.kv_heads * shape.head_dim
    stored, r, h, d = 2 * keep * numbers, components * numbers, shape.heads, shape.kv_heads * shape.head_dim
    products = 2 * r * d + 2 * h * shape.head_dim + 2 * h * r
    times = shape.kv_heads * -(-shape.head_dim // (2 * CHUNK))
    return Reading(stored, 2 * stored + 4 * h, products, UNPACK * r * (times + -(-h // ROWS)) + TURN * d)


def step_seconds(shape: Shape, gpu: Gpu, reading: Reading, batch: int, context: int) -> float:
    """Lower bound in seconds for one token per sequence: all bf16 weights, then `context` tokens of `batch` caches."""
    weights = max(2 * shape.parameters / gpu.bandwidth, 2 * batch * shape.parameters / gpu.products)
    return weights + shape.layers * batch * context * reading.seconds(gpu)


def tokens_that_fit(shape: Shape, gpu: Gpu, reading: Reading) -> float:
    """Cached tokens of all sequences that fit beside bf16 weights, with a tenth of the memory for everything else."""
    return max(0.0, (0.9 * gpu.memory - 2 * shape.parameters) / (shape.layers * reading.stored))


def tokens_for_speedup(shape: Shape, gpu: Gpu, slow: Reading, fast: Reading, speedup: float) -> float:
    """Cached tokens of all sequences together from which `fast` makes a step so many times faster; infinite if none do.

    For batches small enough that weights are bound by memory.
    """
    weights = 2 * shape.parameters / gpu.bandwidth
    gain = shape.layers * (slow.seconds(gpu) - speedup * fast.seconds(gpu))
    return weights * (speedup - 1) / gain if gain > 0 else float("inf")
