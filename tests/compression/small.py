"""Tiny models of every supported architecture with random weights."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import Calibration
from mea.compression.methods import METHODS
from mea.compression.options import CompressOptions
from mea.compression.plan import Plan, make_plan
from mea.models.latent_attention import SUPPORTED

RANKED = [name for name, method in METHODS.items() if not method.coded]  # methods that lower ranks
# What an architecture needs beyond `SIZES`.
EXTRAS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "gemma3_text": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 12,
    },
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 1.5},
}
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip


def tiny(model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with weights of about the size that training gives, biases and norm gains included."""
    torch.manual_seed(0)
    config_class, prefix = SUPPORTED[model_type]
    config = getattr(transformers, config_class)(**{**SIZES, **EXTRAS.get(model_type, {}), **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases start at 0 and gains at 1 or 0, which would hide mistakes with them
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model.to(dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def packed(
    method: str = "predictive", model_type: str = "llama", keep: float = 0.3, layout: str | None = None, **changes: Any
) -> tuple[Any, Any]:
    """A tiny model with a packed cache, fitted on random tokens, and its original; beyond 68 tokens codes are read."""
    original = tiny(model_type, **{"max_position_embeddings": 8192, **changes})
    tokens = torch.randint(0, SIZES["vocab_size"], (8, 128), generator=torch.Generator().manual_seed(1))
    calibration = Calibration(tokens=1024, window=128)
    plan = planned(original.config, method=method, keep=keep, layout=layout, calibration=calibration)
    return run_plans(LayerWalk(original), tokens, [plan])[0].model, original


def planned(config: Any, **fields: Any) -> Plan:
    """The plan for a model in fp32, of a method with ranks unless another is given."""
    return make_plan(config, 4, CompressOptions(**{"method": "post_rope", **fields}))
