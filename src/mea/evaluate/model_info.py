"""A model that is to be evaluated: what can be checked and said of it before its weights are loaded."""

from pathlib import Path
from typing import Any

from mea.models.loading import load_config, load_tokenizer, resolve_dtype, weights_fingerprint


def check_model(source: str, dtype: str) -> None:
    """Check what can be checked without weights.

    Raises
    ------
    ValueError
        No model, an unknown dtype, or a tokenizer that has more tokens than the model.
    """
    config, tokenizer = load_config(source), load_tokenizer(source)
    resolve_dtype(config, dtype)
    size, highest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ValueError(
            f"the tokenizer of {source} has tokens up to {highest:,}, its model {size:,} in all: "
            "the tokenizer belongs to another model"
        )


def labels_of(source: str, against: str | None, label: str | None) -> list[str]:
    """Names of one or two models in records: what is given, or those of their folders.

    Raises
    ------
    ValueError
        A label and a second model.
    """
    if against is None:
        return [label or Path(source).name]
    if label is not None:
        raise ValueError("a label names one model: without --against")
    first, second = Path(source).name, Path(against).name
    return [first, second if second != first else f"{second}-2"]


def identity(source: str, dtype: str) -> dict[str, Any]:
    """What answers depend on: the weights, and the dtype that is computed in."""
    config = load_config(source)
    return {"weights": weights_fingerprint(source), "dtype": str(resolve_dtype(config, dtype)).removeprefix("torch.")}


def compression_of(source: str) -> dict[str, Any] | None:
    """How a compressed model was made, as far as it fits into a line."""
    made = getattr(load_config(source), "compression", None)
    return {k: v for k, v in made.items() if isinstance(v, str | int | float)} if isinstance(made, dict) else None
