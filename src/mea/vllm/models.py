"""vLLM's own model classes with `PagedAttention` in every layer: ``MeaLlamaForCausalLM`` and so on."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from vllm import ModelRegistry

from mea.vllm.attention import PagedAttention, PagedBackend, layer_bytes
from mea.vllm.cache import caches

OPERATION = "vllm::mea_packed_attention"


class NoRotation(nn.Module):
    """In the place of a rotary embedding: the cache holds keys before RoPE."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


class PackedModel:
    """Comes before a stock class in the bases of a combined one."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, layers = vllm_config.model_config.hf_config, self.model.layers
        compilation, code = vllm_config.compilation_config, config.cache_code
        known, rotary = compilation.static_forward_context, _rotary(config)
        at = [0, 0]
        for layer, tiers in zip(layers, code["tiers"], strict=True):
            own, stock = layer.self_attn, layer.self_attn.attn
            own.attn, own.rotary_emb = PagedAttention(stock, config, tiers, rotary), NoRotation()
            known[stock.layer_name] = own.attn
            own.attn.starts = tuple(at)
            sizes = layer_bytes(tiers, stock.num_kv_heads, stock.head_size, torch.get_default_dtype())
            at = [at[0] + sizes[0], at[1] + (0 if tiers is None else sizes[1])]
        pair = caches(*at, code["first"], code["recent"], vllm_config, PagedBackend)
        for layer in layers:
            layer.self_attn.attn.caches = pair
        for cache in pair:
            known[cache.name] = cache
        if compilation.splitting_ops:  # CUDA graphs leave it out
            compilation.splitting_ops.append(OPERATION)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a folder of `mea compress`.

        Raises
        ------
        ValueError
            It lacks a layer's code.
        """
        own = {
            f"model.layers.{index}.self_attn.code.{name}": tensor
            for index, layer in enumerate(self.model.layers)
            if layer.self_attn.attn.code is not None
            for name, tensor in layer.self_attn.attn.code.state_dict(keep_vars=True).items()
        }
        loaded: set[str] = set()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if name in own:
                    own[name].data.copy_(weight)
                    loaded.add(name)
                else:
                    yield name, weight

        found = super().load_weights(others())
        if missing := sorted(own.keys() - loaded):
            raise ValueError(f"the folder lacks {len(missing)} weights of packed caches, such as {missing[0]}")
        return found | {name.replace(".self_attn.code.", ".self_attn.attn.code.") for name in loaded}


def _rotary(config: Any) -> nn.Module:
    """The rotary embedding of transformers, by which the model was compressed."""
    name = type(config).__name__.removeprefix("Mea").removesuffix("Config").removesuffix("Text")
    modelling = sys.modules[getattr(transformers, f"{name}ForCausalLM").__module__]
    return getattr(modelling, f"{name}RotaryEmbedding")(config)


def __getattr__(name: str) -> type:
    """``Mea`` and the name of a stock class, made the first time it is asked for: stock classes are slow to import."""
    stock = name.removeprefix("Mea")
    if stock == name or not stock.endswith("ForCausalLM"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (PackedModel, ModelRegistry.models[stock].load_model_cls()), {"__module__": __name__})
    globals()[name] = made
    return made
