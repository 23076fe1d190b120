"""Put factors into layers, and compressed layers into a model of the compressed class."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.compression.budget import Layout
from mea.compression.calibrate.offload import weights_of
from mea.compression.methods.factors import LayerFactors
from mea.models.fold import stock_form
from mea.models.latent_attention import (
    COMPRESSED_CONFIGS,
    COMPRESSED_MODELS,
    NormedProjection,
    to_latent_attention,
)
from mea.ops.cache_forms import FORMS, PostRope

CHECKED_TOKENS = 24
TOLERANCE = 1e-4
Part = TypeVar("Part")


class ConversionError(ValueError):
    """A converted model fails a self-check and must not be used."""


@torch.no_grad()
def checked_stock_form(model: Any, tokens: Int[Tensor, "n t"]) -> Any:
    """`mea.models.fold.stock_form`, with its logits compared in fp32 with the given model's.

    Raises
    ------
    ValueError
        As `stock_form`.
    ConversionError
        The logits differ.
    """
    stock = stock_form(model)
    if stock is model:
        return model
    ids, wide = tokens[:1, :CHECKED_TOKENS], copy.deepcopy(model).float()
    expected, actual = (form.eval()(ids, use_cache=False).logits for form in (wide, stock_form(wide)))
    error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
    if not error <= TOLERANCE:
        raise ConversionError(
            f"with its mixing folded the model's logits differ by {error:.1e} (allowed: {TOLERANCE:.0e}); nothing was "
            "saved. Please report the model's config"
        )
    return stock


@torch.no_grad()
def compress_attention(attention: Any, factors: LayerFactors, rotary: Any) -> None:
    """Make a stock attention module cache latents, in place; ``v_proj``, ``o_proj`` and the mixing are new modules.

    Its weights must be in memory (`calibrate.offload.weights_of`); `rotary` is the model's rotary embedding.
    """
    value_weight, value_bias = attention.v_proj.weight, attention.v_proj.bias
    (key_encoder, key_decoder), (value_encoder, value_decoder), output, form, groups = factors
    ranks = form.cached_ranks(len(key_encoder), len(value_encoder))
    to_latent_attention(attention, *ranks, form.name, rotary, groups)
    mixing, value_encoder = attention.head_mixing, value_encoder.to(value_weight.device)  # from a file it is elsewhere
    mixing.key_encoder.copy_(_blocks(key_encoder, groups))
    mixing.key_decoder.copy_(_blocks(key_decoder, groups).view_as(mixing.key_decoder))
    mixing.value_decoder.copy_(_blocks(value_decoder, groups).view_as(mixing.value_decoder))
    attention.v_proj.weight.copy_(value_encoder @ value_weight.double())
    if value_bias is not None:
        attention.v_proj.bias.copy_(value_encoder @ value_bias.double())
    if output is not None:
        attention.o_proj = _with_weight(attention.o_proj, output)
    use_own_forward(attention)


def _blocks(matrix: Float[Tensor, "_ m"], groups: int) -> Float[Tensor, "_ _"]:
    """The blocks on the diagonal, stacked."""
    parts = [rows.chunk(groups, dim=1)[group] for group, rows in enumerate(matrix.chunk(groups))]
    return torch.cat(parts)


@torch.no_grad()
def replace_weights(attention: Any, weights: dict[str, Tensor]) -> None:
    """Replace matrices of a compressed attention by parameter name; matrices shared with other models do not change."""
    for name in {name.split(".")[0] for name in weights} - {"head_mixing", "code"}:
        (weight,) = (tensor for full, tensor in weights.items() if full.split(".")[0] == name)
        with weights_of(getattr(attention, name)):
            setattr(attention, name, _with_weight(getattr(attention, name), weight))
    for part in ("head_mixing", "code"):
        if hasattr(attention, part):
            for name, parameter in getattr(attention, part).named_parameters():
                if f"{part}.{name}" in weights:
                    parameter.copy_(weights[f"{part}.{name}"])


def _with_weight(linear: Any, weight: Tensor) -> nn.Module:
    """A new module, because accelerate would read the old one's weight from disk again."""
    if isinstance(linear, NormedProjection):
        return NormedProjection(_with_weight(linear.linear, weight), linear.head_dim, linear.eps)  # pyright: ignore
    like = linear.weight
    new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, like.device, like.dtype)
    new.weight.copy_(weight)
    if linear.bias is not None:
        new.bias.copy_(linear.bias)
    return new


def use_own_forward(module: nn.Module) -> None:
    """Use the forward of the module's new class where accelerate has stored the old one."""
    kept = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    if kept in module.__dict__:
        setattr(module, kept, type(module).forward.__get__(module))


def sharing_copy(module: nn.Module) -> Any:
    """A copy that shares the original's parameters and buffers, so that its structure can be changed freely.

    The hooks of accelerate, which load offloaded weights, are shared as well.
    """
    hooks = [vars(part)["_hf_hook"] for part in module.modules() if "_hf_hook" in vars(part)]
    shared = [*module.parameters(), *module.buffers(), *hooks]
    return copy.deepcopy(module, {id(member): member for member in shared})


def latent_copy(layer: Any, factors: LayerFactors, rotary: Any) -> Any:
    """A decoder layer that caches latents, sharing everything else with `layer`."""
    compressed = sharing_copy(layer)
    compress_attention(compressed.self_attn, factors, rotary)
    return compressed


def latent_config(
    config: Any, layout: Layout, compression: dict[str, Any], form: PostRope = FORMS["post_rope"], groups: int = 1
) -> Any:
    """The configuration of the compressed model: the original's, with the latents and the compression's settings."""
    ranks = [None if pair is None else list(pair) for pair in layout.ranks]
    return compressed_config(
        config, latent_ranks=ranks, latent_form=form.name, latent_groups=groups, compression=compression
    )


def compressed_config(config: Any, **fields: Any) -> Any:
    """The original's configuration as one of the compressed class, with further fields."""
    kept = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    kept.pop("quantization_config", None)
    compressed = COMPRESSED_CONFIGS[config.model_type](**kept | fields)
    compressed._attn_implementation = config._attn_implementation
    compressed._experts_implementation = config._experts_implementation
    return compressed


def assemble(model: Any, factors: list[LayerFactors | None], config: Any) -> Any:
    """The compressed model; uncompressed modules share their weights with the original."""
    return compressed_model(model, config, factors, compress_attention)


def compressed_model(
    model: Any, config: Any, parts: Sequence[Part | None], put: Callable[[Any, Part, Any], None]
) -> Any:
    """A model of the compressed class that shares its weights with the original.

    `put` changes the attention module of each layer that has a part; its weights are in memory then. It also gets the
    model's rotary embedding.
    """
    compressed = sharing_copy(model)
    stock = compressed.config
    for module in compressed.modules():
        if getattr(module, "config", None) is stock:
            module.config = config
    compressed.__class__ = COMPRESSED_MODELS[model.config.model_type]
    compressed._tp_plan = {}
    # Describes how the original's checkpoint was rearranged at loading; the compressed model is saved as it is.
    compressed.__dict__.pop("_weight_conversions", None)
    for layer, part in zip(compressed.model.layers, parts, strict=True):
        if part is not None:
            with weights_of(layer.self_attn):
                put(layer.self_attn, part, compressed.model.rotary_emb)
    return compressed
