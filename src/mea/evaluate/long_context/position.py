"""Loss by position: how much a longer context helps (`mea.evaluate.perplexity` measures it)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.evaluate.long_context.plan import WINDOWS
from mea.evaluate.long_context.prompts import Source
from mea.evaluate.perplexity import block_means, by_position
from mea.text import encode_source


def position_tokens(source: Source, text: str, window: int) -> Int[Tensor, " n"]:
    """As many tokens of a text as the windows take.

    Raises
    ------
    ValueError
        The text has less than one window.
    """
    taken = window - (source.start is not None)
    ids = encode_source(source.tokenizer, text)
    if len(ids) < taken:
        raise ValueError(f"{text} has {len(ids):,} tokens, fewer than the longest length of {window:,}")
    return ids[: min(WINDOWS, len(ids) // taken) * taken]


def by_ranges(
    losses: Float[Tensor, "windows scored"], lengths: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Perplexity in each range between neighbouring lengths, and the mean losses of blocks behind it."""
    edges = (0, *lengths)
    ranges = [
        {"start": part.start, "stop": part.stop} | part.estimate.as_dict() | {"tokens": part.estimate.tokens}
        for part in by_position(losses, edges)
    ]
    parts = torch.tensor_split(losses, [edge - 1 for edge in lengths[:-1]], dim=1)
    blocks = {str(stop): block_means(part) for (_, stop), part in zip(pairwise(edges), parts, strict=True)}
    return ranges, blocks
