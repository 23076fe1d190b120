"""A tokenizer of bytes, a text of a few windows, and a saved model."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compression.small import tiny
from mea.compression import Calibration
from mea.texts import load_text


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
    """As little text as is allowed, none of it twice."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(load_text("calibration")[:4000], encoding="utf-8")
    return Calibration(str(path), tokens=256, window=64, reread=0.0)


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path / "original"
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
