"""A few hundred tiny documents, and settings of runs that take a second."""

import random
from pathlib import Path
from typing import Any

import pytest

from mea.train.settings import PretrainSettings, settings_from

WORDS = ["the", "old", "house", "by", "river", "stood", "empty", "and", "no", "one", "came", "to", "see", "it", "again"]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def some_documents(count: int = 200) -> list[str]:
    rng = random.Random(0)
    return [f"{i}. " + " ".join(rng.choices(WORDS, k=rng.randint(5, 80))) for i in range(count)]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n<>\n".join(some_documents()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tables(corpus) -> dict[str, Any]:
    return {
        "data": {
            "files": [str(corpus)],
            "separator": "\n<>\n",
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
