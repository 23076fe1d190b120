"""Take the mixing out of a trained model: a square HLC disappears into the key and value projections."""

import copy

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mea.attention import MultiheadExplicitAttention
from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM


@torch.no_grad()
def fold(model: MeaForCausalLM) -> MeaForCausalLM | LlamaForCausalLM:
    """The same function without mixing, at the cost of grouped attention.

    Without head norm, QK-norm and sliding window the result is a stock Llama checkpoint, which runs wherever Llama
    does; else it is this package's decoder with grouped attention and the norm.

    Parameters
    ----------
    model
        With ``"mea"``, ``"modified_talking_heads"`` or ``"gqa"`` as its attention. Left as it is.

    Raises
    ------
    ValueError
        For another method, which no projection can absorb, or for fewer component than key/value heads.
    """
    config = model.config
    methods = ("gqa", "mea", "modified_talking_heads")
    if config.attention not in methods:
        raise ValueError(f"{config.attention!r} does not fold into grouped attention; only {', '.join(methods)} do")
    state = model.state_dict()
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if isinstance(attention, MultiheadExplicitAttention):
            prefix = f"model.layers.{i}.self_attn."
            state = {name: x for name, x in state.items() if not name.startswith(prefix)}
            state.update({prefix + name: x for name, x in attention.folded().state_dict().items()})

    folded = _plain_config(config)
    if not folded.attention_options and folded.sliding_window is None and _is_llama_rope(folded):
        plain: MeaForCausalLM | LlamaForCausalLM = LlamaForCausalLM(_llama_config(folded))
    else:
        plain = MeaForCausalLM(folded)
    nn.Module.to(plain, model.device, model.dtype)
    plain.load_state_dict(state)
    return plain.train(model.training)


def _plain_config(config: MeaConfig) -> MeaConfig:
    """The configuration with grouped attention in place of the mixing, whatever else it has kept."""
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


def _llama_config(config: MeaConfig) -> LlamaConfig:
    """What a stock Llama needs to know of `config`: the fields that both have."""
    own = ("model_type", "architectures", "transformers_version", "attention", "attention_options", "head_norm_eps")
    fields = {name: value for name, value in config.to_dict().items() if name not in (*own, "sliding_window")}
    return LlamaConfig(**fields)
