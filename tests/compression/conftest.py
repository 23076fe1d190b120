"""Tiny models of every supported architecture with random weights, and a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mea.compression import Calibration
from mea.models.compressed import SUPPORTED
from mea.texts import load_text

# What an architecture needs beyond `SIZES`.
EXTRAS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """As little text as is allowed."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(load_text("calibration")[:4000], encoding="utf-8")
    return Calibration(str(path), tokens=256, window=64)


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path / "original"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
