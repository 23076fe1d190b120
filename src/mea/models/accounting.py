"""What a configuration costs, in closed form: parameters, floating-point operations, bytes of cache.

Operations are those of matrix products, two per multiplication and addition, as is the custom; norms, activations and
softmax are not counted. Attention counts the whole ``t × s`` score matrix: causality saves up to half of it in kernels
that skip masked blocks. Each function is tested against a count of the real thing.
"""

from dataclasses import dataclass
from typing import Any

from mea.attention.mea import folding_is_cheaper
from mea.models.config import MeaConfig


@dataclass(frozen=True)
class _Heads:
    """Numbers of heads of one layer's parts, and what the method adds to grouped attention."""

    query: int  # heads of the query projection
    key: int  # heads of the key and value projections, which are also what is cached
    value: int
    mixed_keys: bool
    mixed_values: bool
    frequency: bool
    extra: int  # parameters beside projections and mixings


def _heads(config: MeaConfig) -> _Heads:
    options = config.attention_options or {}
    h, h_kv, d = config.num_attention_heads, config.num_key_value_heads or 1, config.head_dim or 0
    kind = config.attention
    mix = options.get("mix", "both") if kind in ("mea", "modified_talking_heads") else "neither"
    keys, values = mix in ("both", "keys"), mix in ("both", "values")
    h_c = options.get("num_component_heads") or h_kv
    query, key, value = (2 * h if kind == "differential_v2" else h), (h_c if keys else h_kv), (h_c if values else h_kv)

    norm = options.get("head_norm", "shared_gain" if kind == "mea" else "off")
    extra = {"off": 0, "no_gain": 0, "shared_gain": d, "per_head_gain": h * d}[norm]
    if kind == "differential_v1":
        extra = 4 * d + 2 * d  # the vectors of lambda, and the gain over a double head
    elif kind == "differential_v2":
        extra = config.hidden_size * h
    elif kind == "talking_heads":
        extra = 2 * h * h
    if options.get("qk_norm"):
        extra += 2 * d
    if config.attention_bias:
        extra += (query + key + value) * d + config.hidden_size
    return _Heads(query, key, value, keys, values, options.get("key_mixing") == "frequency", extra)


def parameters(config: MeaConfig) -> int:
    """Number of parameters, embeddings included; a tied output projection counts once."""
    heads, d, width = _heads(config), config.head_dim or 0, config.hidden_size
    h, h_kv = config.num_attention_heads, config.num_key_value_heads or 1
    attention = width * d * (heads.query + heads.key + heads.value + h) + heads.extra
    if heads.mixed_keys:
        attention += heads.key * h_kv * (d if heads.frequency else 1)
    if heads.mixed_values:
        attention += heads.value * h_kv
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + width


def cache_bytes_per_token(config: MeaConfig, bytes_per_number: int = 2) -> int:
    """Bytes that one more token adds to the cache of one sequence, all layers together."""
    heads = _heads(config)
    return config.num_hidden_layers * (heads.key + heads.value) * (config.head_dim or 0) * bytes_per_number


def cached_share(config: Any) -> float:
    """What a model caches, as a fraction of what grouped attention with as many key/value heads would: 1 of others."""
    if config.model_type != MeaConfig.model_type:
        return 1.0
    heads = _heads(config)
    return (heads.key + heads.value) / (2 * (config.num_key_value_heads or 1))


def training_flops(config: MeaConfig, batch: int, tokens: int) -> int:
    """Operations of one training step: forward, and twice that backward, without recomputation."""
    n = batch * tokens
    layer = _dense(config, n) + _keys_values(config, n) + batch * _attention(config, tokens, tokens)
    return 3 * (config.num_hidden_layers * layer + 2 * n * config.hidden_size * config.vocab_size)


def decode_flops(config: MeaConfig, context: int) -> int:
    """Operations of generating one token of one sequence when `context` tokens, itself included, are in the cache."""
    heads, d, h, h_kv = (
        _heads(config),
        config.head_dim or 0,
        config.num_attention_heads,
        config.num_key_value_heads or 1,
    )
    h_c, read = min(heads.key, heads.value), _attention(config, 1, context)
    components = 2 * config.hidden_size * (heads.key + heads.value) * d
    if h_c == h_kv:
        attention = _keys_values(config, 1) + read
    elif heads.mixed_keys and heads.mixed_values:
        # Absorbed: queries and outputs are as wide as all components together; the outputs are un-mixed.
        attention = components + h_c * read + 2 * h * h_c * d
    else:
        attention = components + read + 2 * context * h_c * h_kv * d * (2 if heads.frequency else 1)
    return config.num_hidden_layers * (_dense(config, 1) + attention) + 2 * config.hidden_size * config.vocab_size


def _dense(config: MeaConfig, n: int) -> int:
    """The projections of queries and output, the feed-forward layer, and Differential V2's of lambda."""
    heads, d, h = _heads(config), config.head_dim or 0, config.num_attention_heads
    gate = h if config.attention == "differential_v2" else 0
    return 2 * n * config.hidden_size * ((heads.query + h) * d + 3 * config.intermediate_size + gate)


def _keys_values(config: MeaConfig, n: int) -> int:
    """Projections of keys and values and their mixing, where nothing is read from a cache of components."""
    heads, d, h_kv, width = _heads(config), config.head_dim or 0, config.num_key_value_heads or 1, config.hidden_size
    options = config.attention_options or {}
    h_c, fold, total = min(heads.key, heads.value), options.get("fold", "auto"), 0
    cheaper = folding_is_cheaper(n, width, h_c, h_kv)
    # A norm between components and mixing, as there is for fewer key components, keeps the two apart.
    apart = bool(options.get("qk_norm")) and h_c < h_kv
    for count, mixed, real, folds in (
        (heads.key, heads.mixed_keys, 4 if heads.frequency else 2, not apart),
        (heads.value, heads.mixed_values, 2, True),
    ):
        if mixed and folds and (fold == "always" or (fold == "auto" and cheaper)):
            total += real * count * h_kv * d * (width + config.attention_bias) + 2 * n * width * h_kv * d
        else:
            total += 2 * n * width * count * d + (real * n * count * h_kv * d if mixed else 0)
    return total


def _attention(config: MeaConfig, t: int, s: int) -> int:
    """Scores and reads of one sequence, `t` queries and `s` keys, at the width of one head."""
    query, d, h = _heads(config).query, config.head_dim or 0, config.num_attention_heads
    score = read = d
    if config.attention == "differential_v1":
        # Values are of double width. A single query reads their halves one after the other, scores and all.
        score, read = (2 * d if t == 1 else d), 2 * d
    mixing = 2 * 2 * h * h if config.attention == "talking_heads" else 0
    return t * s * (2 * query * (score + read) + mixing)
