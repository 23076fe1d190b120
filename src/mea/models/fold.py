"""Fold the mixing of a trained model into its key and value projections."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mea.attention import KnockingHeadsAttention, MultiheadExplicitAttention
from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM
from mea.models.latent_attention import add_head_norm

FOLDING = ("gqa", "mea", "modified_talking_heads", "knocking_heads")
STOCK_MODELS = {LlamaConfig: LlamaForCausalLM, MistralConfig: MistralForCausalLM, Qwen3Config: Qwen3ForCausalLM}


@torch.no_grad()
def fold(model: MeaForCausalLM) -> Any:
    """The same model without mixing, with the cost of grouped attention.

    Without head norm, QK-norm and sliding window the result is a stock Llama checkpoint, which runs wherever Llama
    does; else it is this package's decoder with grouped attention and the norm.

    Parameters
    ----------
    model
        With an attention of `FOLDING`. It is not changed.

    Raises
    ------
    ValueError
        The attention is another method, whose mixing cannot be folded, or has fewer component than key/value heads, or
        keys and values share them.
    """
    config = model.config
    if config.attention not in FOLDING:
        raise ValueError(f"{config.attention!r} does not fold into grouped attention; only {', '.join(FOLDING)} do")
    state, folded = _folded_state(model), _plain_config(config)
    if not folded.attention_options and folded.sliding_window is None and _is_llama_rope(folded):
        return _build(LlamaForCausalLM, _stock_config(folded), state, model)
    return _build(MeaForCausalLM, folded, state, model)


def stock_config(config: Any) -> Any:
    """The configuration of `stock_form`'s result; for models of transformers, the given configuration.

    Raises
    ------
    ValueError
        The model has no such form; the message says why and what to do.
    """
    if config.model_type != MeaConfig.model_type:
        return config
    if config.attention not in FOLDING:
        raise ValueError(
            f"the cache of {config.attention!r} attention cannot be compressed: its weights do not fold into grouped "
            f"attention; supported are {', '.join(FOLDING)}"
        )
    options = config.attention_options or {}
    components = options.get("num_component_heads") or config.num_key_value_heads
    mixed = config.attention == "mea" and options.get("mix", "both") in ("both", "keys")
    smaller = components < config.num_key_value_heads or options.get("share_components")
    if smaller and mixed and options.get("qk_norm"):
        raise ValueError(
            f"this model caches {components} component heads for {config.num_key_value_heads} key/value heads "
            "and normalises them, so that they do not fold into the key projection; train one without qk_norm"
        )
    if not _is_llama_rope(config):
        raise ValueError("a decoder with partial or no rotary embedding cannot be compressed; train it with full RoPE")
    if config.sliding_window is not None and config.attention_bias and not options.get("qk_norm"):
        raise ValueError(
            "a decoder with a sliding window and attention_bias cannot be compressed without qk_norm; train it without "
            "one of the two"
        )
    plain = _plain_config(config)
    stock = _stock_config(plain)
    if "head_norm" in (plain.attention_options or {}):
        stock.head_norm_eps = config.head_norm_eps
    return stock


@torch.no_grad()
def stock_form(model: Any) -> Any:
    """The same model in transformers' own classes (Llama, Mistral or Qwen3), which compression works on.

    The mixing goes into ``W_K`` and ``W_V``; where components are fewer than key/value heads, they get that many heads,
    of low rank together, and a layout as small as the components loses nothing. The gain of a head norm goes into
    ``W_O``; the norm itself stands before it (`mea.models.latent_attention.NormedProjection`). Another model than this
    package's decoder is returned as it is.

    Raises
    ------
    ValueError
        As `stock_config`.
    """
    config = model.config
    stock = stock_config(config)
    if stock is config:
        return model
    state = _folded_state(copy.deepcopy(model).float(), expand=True)  # products of weights are rounded once, at the end
    # Qwen3 has one eps for all norms: its QK-norm of s x is this one of x, whose eps is smaller by s².
    scale = (config.rms_norm_eps / config.head_norm_eps) ** 0.5
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn."
        gain = state.pop(prefix + "head_norm.weight", None)
        if gain is not None:
            weight = state[prefix + "o_proj.weight"]
            state[prefix + "o_proj.weight"] = (weight.unflatten(1, (-1, gain.shape[-1])) * gain).flatten(1)
        if isinstance(stock, Qwen3Config):
            for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"):
                if prefix + name in state:
                    state[prefix + name] = state[prefix + name] * scale
    built = _build(STOCK_MODELS[type(stock)], stock, state, model)
    if getattr(stock, "head_norm_eps", None) is not None:
        add_head_norm(built, stock.head_norm_eps)
    return built


def _folded_state(model: MeaForCausalLM, *, expand: bool = False) -> dict[str, Tensor]:
    """The weights, with every mixing inside the projections; with `expand` also that of fewer components."""
    state = model.state_dict()
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if isinstance(attention, MultiheadExplicitAttention | KnockingHeadsAttention):
            prefix = f"model.layers.{i}.self_attn."
            state = {name: x for name, x in state.items() if not name.startswith(prefix)}
            state.update({prefix + name: x for name, x in attention.folded(expand=expand).state_dict().items()})
    return state


def _build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor], like: MeaForCausalLM
) -> PreTrainedModel:
    """A model with these weights, with the dtype and device of another.

    It is created in that dtype: a later cast would round the rotary frequencies.
    """
    with torch.device(like.device):
        model = cls._from_config(config, dtype=like.dtype, attn_implementation=like.config._attn_implementation)
    model.load_state_dict(state)
    return model.train(like.training)


def _plain_config(config: MeaConfig) -> MeaConfig:
    """The configuration with grouped attention instead of the mixing, and all else unchanged."""
    plain = copy.deepcopy(config)
    options = config.attention_options or {}
    norm = options.get("head_norm", "shared_gain" if config.attention == "mea" else "off")
    plain.attention = "gqa"
    plain.attention_options = {"qk_norm": True} if options.get("qk_norm") else {}
    if norm != "off":
        plain.attention_options["head_norm"] = norm
    return plain


def _is_llama_rope(config: MeaConfig) -> bool:
    rope = config.rope()
    return rope is not None and rope.fraction == 1.0


def _stock_config(plain: MeaConfig) -> Any:
    """The common fields for a stock model with the same projections, QK-norm and window."""
    own = ("model_type", "architectures", "transformers_version", "attention", "attention_options", "head_norm_eps")
    fields = {name: value for name, value in plain.to_dict().items() if name not in (*own, "sliding_window")}
    window = plain.sliding_window
    if (plain.attention_options or {}).get("qk_norm"):
        sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
        return Qwen3Config(**fields, **sliding)
    return LlamaConfig(**fields) if window is None else MistralConfig(**fields, sliding_window=window)
