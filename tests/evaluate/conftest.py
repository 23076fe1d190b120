"""Tiny random models of several architectures, which differ in what they do to their logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 600,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIAL = {
    "Granite": {"logits_scaling": 3.0},
    "Gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 64},
    "Gemma3": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 600},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """tiny(architecture, **changes) makes a model whose predictions are far from uniform."""

    def make(name: str = "Llama", **changes: Any) -> Any:
        torch.manual_seed(0)
        sizes = {k: v for k, v in SIZES.items() if name not in ("GPT2", "OPT") or k not in ("head_dim",)}
        config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**sizes | SPECIAL.get(name, {}) | changes)
        model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Any:
    """A byte is a token, so that a tiny model can read anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def two_models(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Any) -> Callable[[int], Path]:
    """two_models(context) is a folder with the models "first" and "second": the same shape, other weights."""

    def make(context: int) -> Path:
        root = tmp_path_factory.mktemp("models")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        for seed, name in enumerate(("first", "second")):
            torch.manual_seed(seed)
            config = transformers.LlamaConfig(
                vocab_size=258, num_key_value_heads=2, max_position_embeddings=context, **sizes
            )
            transformers.LlamaForCausalLM(config).save_pretrained(root / name)
            bytes_tokenizer.save_pretrained(root / name)
        return root

    return make
