"""Checks what the plugin can serve; the error for everything else says what to do."""

from collections.abc import Iterator
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig


class PackedModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook for a model's configuration: it runs before workers start."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot be served.

        Raises
        ------
        ValueError
            The message names the model's or the engine's setting, and what to do.
        """
        config = vllm_config.model_config.hf_config
        for problem in (*_of_model(config), *_of_engine(vllm_config)):
            raise ValueError(f"mea cannot serve this: {problem}")


def _of_model(config: Any) -> Iterator[str]:
    if config.cache_code is None:
        yield (
            "the model caches latents; compress the original with --method predictive or joint, whose packed caches "
            "vLLM can page"
        )
        return
    if config.head_norm_eps is not None:
        yield "the model has a norm of each head; serve it with transformers"
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (getattr(config, "sliding_window", None) and config.model_type == "mea_mistral"):
        yield "the model has layers with a sliding window; serve it with transformers"
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in parameters.values() if isinstance(part, dict)}
    kinds.add(parameters.get("rope_type", "default"))
    for kind in sorted({"dynamic", "longrope"} & kinds):
        yield f"RoPE of type {kind!r} changes with the length of the text; serve the model with transformers"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield "only a part of each head's channels rotates (partial_rotary_factor); serve the model with transformers"
    own = config.hidden_size // config.num_attention_heads
    if config.model_type == "mea_qwen2" and (getattr(config, "head_dim", None) or own) != own:
        yield f"vLLM's Qwen2 has heads of {own} channels, not of {config.head_dim}; serve the model with transformers"


def _of_engine(vllm_config: Any) -> Iterator[str]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"{name}={getattr(parallel, name)}; codes span all heads of a layer, so give {name}=1"
    if cache.cache_dtype != "auto":
        yield f"kv_cache_dtype={cache.cache_dtype!r}; the cache is packed already, so leave it at 'auto'"
    if cache.user_specified_block_size:
        yield f"block_size={cache.block_size}; the sizes of blocks follow from the codes, so leave it out"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding; leave speculative_config out"
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector; leave kv_transfer_config out"
    if vllm_config.lora_config is not None:
        yield "LoRA adapters; merge the adapter into the original model and compress that"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "the hybrid KV cache manager is off; leave disable_hybrid_kv_cache_manager out"
