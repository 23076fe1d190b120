"""A tiny random model with its tokenizer, saved as a folder, and the command line called in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mea.cli import app

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


def save(folder: Path, seed: int, words: list[str]) -> str:
    torch.manual_seed(seed)
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models_(tmp_path_factory) -> dict[str, str]:
    """Folders: `a` and `b` share a tokenizer, `other` numbers its words differently."""
    root = tmp_path_factory.mktemp("models")
    words = {"a": WORDS, "b": WORDS, "other": WORDS[:4] + WORDS[:3:-1]}
    return {name: save(root / name, seed, words[name]) for seed, name in enumerate(words)}


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * i % 60}" for i in range(300)), encoding="utf-8")
    return str(path)


@pytest.fixture
def mea() -> Callable[..., Any]:
    """mea("perplexity", ...) gives an object with exit_code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
