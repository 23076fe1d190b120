"""Settings of runs that take a second."""

from pathlib import Path
from typing import Any

import pytest

from mea.train.pretraining.settings import PretrainSettings, settings_from
from tiny_corpus import SEPARATOR, merged, some_documents

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(SEPARATOR.join(some_documents()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tables(corpus) -> dict[str, Any]:
    return {
        "data": {
            "files": [str(corpus)],
            "separator": SEPARATOR,
            "vocabulary": 300,
            "validation_fraction": 0.1,
            "validation_tokens": 512,
            "row": 32,
        },
        "model": {"variant": "mea", "changes": TINY},
        "optim": {"tokens": 20 * 128, "batch_tokens": 128, "warmup_tokens": 256},
        "run": {"validations": 4, "checkpoints": 5},
    }


@pytest.fixture(scope="session")
def settings(tables):
    """settings(optim={...}) gives the tiny run with changes."""

    def make(**changes: Any) -> PretrainSettings:
        return settings_from(merged(tables, changes))

    return make
