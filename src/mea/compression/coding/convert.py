"""Put codes into layers, and coded layers into a model; check the result."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mea.compression.calibrate.layerwise import LayerInputs, LayerWalk
from mea.compression.calibrate.offload import resident, weights_of
from mea.compression.coding.fit import LayerCode, Reading, full_code
from mea.compression.convert import CHECKED_TOKENS, TOLERANCE, ConversionError, sharing_copy, use_own_forward
from mea.models.latent_attention import COMPRESSED_CONFIGS, COMPRESSED_MODELS, to_coded_attention

CHECKED_EXACT = (2, 6)  # first and newest tokens that the checks read exactly: the others are read by their codes


def coded_config(
    config: Any, reading: str, exact: tuple[int, int], codes: Sequence[LayerCode | None], told: Any
) -> Any:
    """The configuration of the compressed model; `told` are the compression's settings."""
    kept = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    kept.pop("quantization_config", None)
    tiers = [None if code is None else [list(tier) for tier in code.tiers] for code in codes]
    code = {"reading": reading, "first": exact[0], "recent": exact[1], "tiers": tiers}
    compressed = COMPRESSED_CONFIGS[config.model_type](**kept | {"cache_code": code, "compression": told})
    compressed._attn_implementation = config._attn_implementation
    compressed._experts_implementation = config._experts_implementation
    return compressed


@torch.no_grad()
def code_attention(attention: Any, code: LayerCode, settings: dict[str, Any], rotary: Any) -> None:
    """Make a stock attention module pack its cache, in place; its weights must be in memory."""
    to_coded_attention(attention, settings, [list(tier) for tier in code.tiers], rotary)
    for name, tensor in attention.code.state_dict().items():
        tensor.copy_(code.tensors[name])
    use_own_forward(attention)


def assemble_coded(model: Any, codes: Sequence[LayerCode | None], config: Any) -> Any:
    """The compressed model; it shares all weights of the original."""
    compressed = sharing_copy(model)
    stock = compressed.config
    for module in compressed.modules():
        if getattr(module, "config", None) is stock:
            module.config = config
    compressed.__class__ = COMPRESSED_MODELS[model.config.model_type]
    compressed._tp_plan = {}
    compressed.__dict__.pop("_weight_conversions", None)  # of the original's checkpoint
    for layer, code in zip(compressed.model.layers, codes, strict=True):
        if code is not None:
            with weights_of(layer.self_attn):
                code_attention(layer.self_attn, code, config.cache_code, compressed.model.rotary_emb)
    return compressed


@torch.no_grad()
def check_codes(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    readings: Sequence[Reading | None],
    codes: Sequence[LayerCode | None],
) -> dict[str, float]:
    """The two checks of every conversion, on a few tokens; `full_rank` and `cached` errors.

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
    for layer, reading, code, given in zip(walk.layers, readings, codes, inputs, strict=True):
        loaded = resident(layer)
        original = loaded(original, **given.options)
        if reading is None or code is None:
            full, chosen = (loaded(states, **given.options) for states in (full, chosen))
            continue
        exact = _copy(loaded, full_code(reading), reading.name, given.rotary)
        exact.self_attn.code.exactly = True
        full = exact(full, **given.options)
        coded = _copy(loaded, code, reading.name, given.rotary)
        seen: list[dict[str, Any]] = []
        handle = coded.self_attn.register_forward_pre_hook(
            lambda *call, seen=seen: seen.append(call[2]), with_kwargs=True
        )
        chosen = coded(chosen, **given.options)
        handle.remove()
        cached = max(cached, _cached_error(coded.self_attn, seen[0], given))
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
                f"{what} by {errors[name]:.1e} (allowed: {TOLERANCE:.0e}); nothing was saved. The model's attention has "
                "a feature that the conversion does not support; please report the model's config"
            )
    return errors


def _cached_error(attention: Any, arguments: dict[str, Any], inputs: LayerInputs) -> float:
    """Largest relative difference between attention token by token and at once, in fp64."""
    attention = copy.deepcopy(attention).double()
    attention.layer_idx, cache, steps = 0, DynamicCache(), []
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
    return ((torch.cat(steps, 1) - at_once).abs().max() / at_once.abs().max().clamp_min(1e-30)).item()


def _copy(layer: Any, code: LayerCode, reading: str, rotary: Any) -> Any:
    copied = sharing_copy(layer)
    settings = {"reading": reading, "first": CHECKED_EXACT[0], "recent": CHECKED_EXACT[1]}
    code_attention(copied.self_attn, code, settings, rotary)
    return copied
