"""Plugin for vLLM: ``vllm serve`` and ``vllm.LLM`` take what `mea compress` writes. Needs the ``vllm`` extra.

vLLM finds `register` by its entry point (group ``vllm.general_plugins``) and calls it in each of its processes.

- `mea.vllm.checks`: what is refused, before any weight is read.
- `mea.vllm.models`: vLLM's own model classes, with another attention.
- `mea.vllm.attention`: that attention over pages, and how its steps are described.
- `mea.vllm.cache`: what pages hold, how large they are, and when they are freed.
"""

# Prefixes of the class names in `mea.models.latent_attention.SUPPORTED`, which is slow to import: every process of
# vLLM calls `register`, whatever model it serves.
PREFIXES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma3", "Granite")


def register() -> None:
    """Tell vLLM which classes serve the compressed models; called more than once without harm."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from mea.vllm.checks import PackedModelConfig

    for prefix in PREFIXES:
        name = f"Mea{prefix}ForCausalLM"
        if name not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(name, f"mea.vllm.models:{name}")
            MODELS_CONFIG_MAP[name] = PackedModelConfig
