"""A model to evaluate: checks and facts before its weights are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea.models.loading import load_config, load_tokenizer, resolve_dtype, weights_fingerprint


@dataclass(frozen=True)
class ModelInfo:
    """A model by the name of its folder, file or repository, and by its label in records."""

    source: str
    label: str

    def check(self, dtype: str) -> None:
        """Check what can be checked without weights.

        Raises
        ------
        ValueError
            No model, an unknown dtype, or a tokenizer that has more tokens than the model.
        """
        config, tokenizer = load_config(self.source), load_tokenizer(self.source)
        resolve_dtype(config, dtype)
        size, highest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
        if highest >= size:
            raise ValueError(
                f"the tokenizer of {self.source} has tokens up to {highest:,}, its model {size:,} in all: "
                "the tokenizer belongs to another model"
            )

    def identity(self, dtype: str) -> dict[str, Any]:
        """What every answer depends on: the weights, and the dtype of the computation."""
        resolved = resolve_dtype(load_config(self.source), dtype)
        return {"weights": weights_fingerprint(self.source), "dtype": str(resolved).removeprefix("torch.")}

    @property
    def context(self) -> int | None:
        """Tokens that the model can read, None without a limit."""
        return getattr(load_config(self.source).get_text_config(), "max_position_embeddings", None)

    @property
    def compression(self) -> dict[str, Any] | None:
        """How a compressed model was made: the settings that are single values."""
        made = getattr(load_config(self.source), "compression", None)
        return {k: v for k, v in made.items() if isinstance(v, str | int | float)} if isinstance(made, dict) else None


def label_models(source: str, against: str | None = None, label: str | None = None) -> list[ModelInfo]:
    """One or two models with labels: the label that is given, or the names of their folders.

    Raises
    ------
    ValueError
        A label and a second model.
    """
    if against is None:
        return [ModelInfo(source, label or Path(source).name)]
    if label is not None:
        raise ValueError("a label is for one model: leave out the label or --against")
    first, second = Path(source).name, Path(against).name
    return [ModelInfo(source, first), ModelInfo(against, second if second != first else f"{second}-2")]
