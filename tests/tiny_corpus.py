"""A few hundred short documents, the same every time, and settings for training on them."""

import random
from typing import Any

WORDS = ["the", "old", "house", "by", "river", "stood", "empty", "and", "no", "one", "came", "to", "see", "it", "again"]
SEPARATOR = "\n<>\n"


def some_documents(count: int = 200) -> list[str]:
    rng = random.Random(0)
    return [f"{i}. " + " ".join(rng.choices(WORDS, k=rng.randint(5, 80))) for i in range(count)]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}}
