"""Put codes into layers, and coded layers into a model; check the result."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mea.compression.calibrate.layerwise import LayerInputs, LayerWalk
from mea.compression.calibrate.offload import resident
from mea.compression.coding.fit import LayerCode, Reading, full_code
from mea.compression.convert import (
    CHECKED_TOKENS,
    TOLERANCE,
    ConversionError,
    compressed_config,
    compressed_model,
    sharing_copy,
    use_own_forward,
)
from mea.models.latent_attention import to_coded_attention

CHECKED_EXACT = (2, 6)  # first and newest tokens that the checks read exactly: the others are read by their codes


def coded_config(
    config: Any, reading: str, exact: tuple[int, int], codes: Sequence[LayerCode | None], told: Any
) -> Any:
    """The configuration of the compressed model; `told` are the compression's settings."""
    tiers = [None if code is None else [list(tier) for tier in code.tiers] for code in codes]
    code = {"reading": reading, "first": exact[0], "recent": exact[1], "tiers": tiers}
    return compressed_config(config, cache_code=code, compression=told)


@torch.no_grad()
def code_attention(attention: Any, code: LayerCode, settings: dict[str, Any], rotary: Any) -> None:
    """Make a stock attention module pack its cache, in place; its weights must be in memory."""
    to_coded_attention(attention, settings, [list(tier) for tier in code.tiers], rotary)
    for name, tensor in attention.code.state_dict().items():
        tensor.copy_(code.tensors[name])
    use_own_forward(attention)


def assemble_coded(model: Any, codes: Sequence[LayerCode | None], config: Any) -> Any:
    """The compressed model; it shares all weights of the original."""
    return compressed_model(
        model, config, codes, lambda attention, code, rotary: code_attention(attention, code, config.cache_code, rotary)
    )


@torch.no_grad()
def check_codes(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    readings: Sequence[Reading | None],
    codes: Sequence[LayerCode | None],
    advance: Callable[[int], None] = lambda _layer: None,
) -> dict[str, float]:
    """The two checks of every conversion, on a few tokens; `full_rank` and `cached` errors.

    `advance` is called with the layer that begins.

    1. With all components and without rounding, the logits are the original's, in fp32.
    2. In every layer, attention token by token over the packed cache equals the pass over all tokens at once, in fp64:
       where sums differ in their last digit, a code may fall on the other side of an edge, in fp32 one in 10^5.

    Raises
    ------
    ConversionError
        An error is above `mea.compression.convert.TOLERANCE`.
    """
    ids = tokens[:1, :CHECKED_TOKENS]
    inputs = walk.inputs(ids.shape[1])
    original = full = chosen = walk.embed(ids).float()
    cached = 0.0
    for index, (layer, reading, code, given) in enumerate(zip(walk.layers, readings, codes, inputs, strict=True)):
        advance(index)
        loaded = resident(layer)
        original = loaded(original, **given.options)
        if reading is None or code is None:
            full, chosen = (loaded(states, **given.options) for states in (full, chosen))
            continue
        exact = _copy(loaded, full_code(reading), reading.name, given.rotary)
        exact.self_attn.code.exactly = True
        full = exact(full, **given.options)
        coded = _copy(loaded, code, reading.name, given.rotary)
        with _calls(coded.self_attn) as calls:
            chosen = coded(chosen, **given.options)
        cached = max(cached, _cached_error(coded.self_attn, calls[0], given))
    logits, expected = walk.read_out(ids, torch.cat([full, original]))
    errors = {
        "full_rank": ((logits - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item(),
        "cached": cached,
    }
    for name, what in (
        ("full_rank", "with all components and no rounding the logits differ from the original's"),
        ("cached", "decoding over the packed cache differs from the pass over all tokens at once"),
    ):
        if not errors[name] <= TOLERANCE:
            raise ConversionError(
                f"{what} by {errors[name]:.1e} (allowed: {TOLERANCE:.0e}); nothing was saved. The model's attention "
                "has a feature that the conversion does not support; please report the model's config"
            )
    return errors


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """A list to which every call of the module appends its keyword arguments."""
    calls: list[dict[str, Any]] = []
    handle = module.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _cached_error(attention: Any, arguments: dict[str, Any], inputs: LayerInputs) -> float:
    """Largest relative difference between attention token by token and at once, in fp64."""
    attention = copy.deepcopy(attention).double()
    cache: Any = DynamicCache()
    attention.layer_idx, steps = 0, []
    hidden, (cos, sin) = arguments["hidden_states"].double(), (x.double() for x in inputs.position_embeddings)
    at_once = attention(**arguments | {"hidden_states": hidden, "position_embeddings": (cos, sin)})[0]
    for t in range(hidden.shape[1]):
        new = slice(t, t + 1)
        slots, past = cache.layers[0].get_mask_sizes(1) if cache.layers else (1, 0)
        step = {
            "hidden_states": hidden[:, new],
            "position_embeddings": (cos[:, new], sin[:, new]),
            "position_ids": inputs.options["position_ids"][:, new],
            "attention_mask": inputs.mask[:, :, new, past : past + slots],
            "past_key_values": cache,
        }
        steps.append(attention(**arguments | step)[0])
    error = (torch.cat(steps, 1) - at_once).abs().max() / at_once.abs().max().clamp_min(1e-30)
    return error.nan_to_num(math.inf).item()  # NaN would be lost in a maximum


def _copy(layer: Any, code: LayerCode, reading: str, rotary: Any) -> Any:
    copied = sharing_copy(layer)
    settings = {"reading": reading, "first": CHECKED_EXACT[0], "recent": CHECKED_EXACT[1]}
    code_attention(copied.self_attn, code, settings, rotary)
    return copied
