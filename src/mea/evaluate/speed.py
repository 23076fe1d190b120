"""Bytes of a model's KV cache, measured on a real one, and seconds of a decoding step."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mea.models.cache import PreallocatedCache, PreallocatedLayer
from mea.models.packed_cache import PackedLayer
from mea.models.quantized_cache import QuantisedLayer
from mea.records import Progress

PROMPT = 512
PACKED = "packed"  # name of `packed_attention` in transformers
MakeCache = Callable[[Any], Any]  # from a model's configuration to an empty cache


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a real cache of one sequence after `tokens` tokens."""

    tokens: int
    layer_bytes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(self.layer_bytes)

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each token of the context, also of those that a sliding layer no longer holds."""
        return self.bytes / self.tokens


@torch.no_grad()
def cache_size(model: Any, tokens: int = 256, make_cache: MakeCache | None = None) -> CacheSize:
    """Add up the tensors that a model's cache holds after `tokens` tokens.

    Beyond `PROMPT` tokens the cache repeats those of a prompt if possible: its size does not depend on the tokens.

    Parameters
    ----------
    make_cache
        From the model's configuration to an empty cache; the model's own if None.

    Raises
    ------
    ValueError
        The model does not give a cache back, or its context is too short.
    """
    _check_context(model, tokens)
    if tokens > PROMPT:
        return CacheSize(tokens, held_bytes(_prefill(model, tokens, tokens, make_cache)[0]))
    options = {} if make_cache is None else {"past_key_values": make_cache(model.config.get_text_config())}
    output = model.base_model(input_ids=_some_tokens(model, tokens), use_cache=True, **options)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    if not layers:
        raise ValueError(f"{type(model).__name__} gives back no cache whose layers could be measured")
    return CacheSize(tokens, held_bytes(output.past_key_values))


def held_bytes(cache: Any) -> tuple[int, ...]:
    """Bytes that each layer of a cache holds now."""
    return tuple(sum(tensor.nbytes for tensor in _tensors(layer)) for layer in cache.layers)


@torch.no_grad()
def decode_seconds(
    models: Mapping[str, Any],
    context: int,
    steps: int = 32,
    *,
    caches: Mapping[str, MakeCache] | None = None,
    warmup: int = 3,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Seconds of every greedy decoding step of each model, after a prompt of `context` tokens.

    The models alternate step by step in one run, so that other work on the machine affects all of them alike. Every
    step adds a token; `warmup` steps of each are not counted. Caches are preallocated: one that is copied to grow, as
    ``generate`` does by default, would favour the smaller.

    Parameters
    ----------
    models
        Name -> model; every model keeps its own cache.
    context
        Tokens in the cache before the first step.
    caches
        Name -> cache, for models that do not use a preallocated cache.
    progress
        Called with ``"decoding in turns"``, the steps done and all steps.

    Raises
    ------
    ValueError
        Context and steps exceed a model's context, or one of the numbers is not positive.
    """
    if context < 1 or steps < 1 or warmup < 0:
        raise ValueError(f"context and steps must be positive, not {context} and {steps} (warm-up {warmup})")
    total = context + warmup + steps
    for model in models.values():
        _check_context(model, total)
    caches = caches or {}
    states = {name: _prefill(model, context, total, caches.get(name)) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    for step in range(warmup + steps):
        for name, model in models.items():
            cache, token = states[name]
            began = _now(model)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
            elapsed = _now(model) - began
            states[name] = (cache, token)
            if step >= warmup:
                samples[name].append(elapsed)
        if progress:
            progress("decoding in turns", step + 1, warmup + steps)
    return samples


def speed_ratio(seconds: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Median of the time relative to the reference's in the same turn, with the lower and upper quartile."""
    ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
    n = len(ratios)
    return median(ratios), ratios[(n - 1) // 4], ratios[n - 1 - (n - 1) // 4]


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Stock attention, but for one new token each kv head's queries are the rows of one matrix.

    With grouped queries, PyTorch's kernels for processors are several times slower when they expand the kv heads to the
    query heads, as transformers does.
    """
    b, h, q, d = query.shape
    if q > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    packed = query.reshape(b, key.shape[1], -1, d)
    output = scaled_dot_product_attention(packed, key, value, scale=options.get("scaling"))
    return output.view(b, 1, h, d), None


def use_packed_decode(model: Any) -> Any:
    """Set a stock model to decode by `packed_attention`, and return it: the baseline that compression has to beat."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    model.set_attn_implementation(PACKED)
    return model


def _prefill(model: Any, context: int, total: int, make_cache: MakeCache | None) -> tuple[Any, Tensor]:
    cache = PreallocatedCache(model.config.get_text_config(), capacity=total)
    tokens = _some_tokens(model, context)
    layers: list[Any] = cache.layers
    codes = _codes(model)
    for index in codes:
        layers[index] = DynamicLayer()  # the model packs it
    # What is cached does not change the time of a step, so that a long context may repeat a short one.
    repeats = all(index in codes or isinstance(layer, PreallocatedLayer) for index, layer in enumerate(layers))
    prompt = tokens[:, : PROMPT if repeats else None]
    model.base_model(input_ids=prompt, past_key_values=cache, use_cache=True)  # without logits of the whole prompt
    missing = context - prompt.shape[1]
    for index, layer in enumerate(layers if missing else ()):
        times = -(-missing // layer.keys.shape[2])
        more = [cached.repeat(1, 1, times, 1)[:, :, :missing] for cached in (layer.keys, layer.values)]
        if index in codes:
            layer.append(*more, codes[index].encode)
        else:
            layer.update(*more)
    if make_cache is not None:
        other = make_cache(model.config.get_text_config())
        for index, layer in enumerate(layers):
            other.update(layer.keys, layer.values, index)
        cache = other
    return cache, tokens[:, -1:]


def _codes(model: Any) -> dict[int, Any]:
    """The codes of layers that pack their cache, by the layers' numbers."""
    layers = getattr(model.base_model, "layers", ())
    codes = {index: getattr(getattr(layer, "self_attn", None), "code", None) for index, layer in enumerate(layers)}
    return {index: code for index, code in codes.items() if code is not None}


def _some_tokens(model: Any, count: int) -> Tensor:
    """Arbitrary valid tokens: size and speed do not depend on which."""
    size = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(count, device=model.device) * 31 % size)[None]


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, QuantisedLayer | PackedLayer):
        return layer.stored()
    if isinstance(layer, PreallocatedLayer):  # without room for more tokens
        return [x for x in (layer.keys, layer.values) if x is not None]
    return [tensor for item in vars(layer).values() for tensor in _within(item) if tensor.dim() > 1]


def _within(item: Any) -> list[Tensor]:
    """Tensors in nested lists: transformers' quantised layers keep codes with a dictionary of scales.

    Of a tensor made of others (quanto's) those, not the numbers that it stands for.
    """
    if isinstance(item, dict):
        item = [value for name, value in item.items() if name != "_buffers"]
    if isinstance(item, list | tuple):
        return [tensor for part in item for tensor in _within(part)]
    if hasattr(item, "__tensor_flatten__"):
        return [tensor for name in item.__tensor_flatten__()[0] for tensor in _within(getattr(item, name))]
    return [item] if isinstance(item, Tensor) else []


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _check_context(model: Any, tokens: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if tokens < 1 or (longest is not None and tokens > longest):
        raise ValueError(f"{tokens:,} tokens do not fit the model's context of {longest or 0:,}")
