"""Losses of a text read in blocks over a cache, as decoding reads it: what a cache forgets or rounds shows.

In one pass over a whole window no token is ever read back from the cache, so that perplexity says nothing about how it
is stored. Here a window is fed in blocks as long as those that the cache closes: every token sees exactly what it would
see if the text were decoded token by token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.evaluate.perplexity import cross_entropy
from mea.models.quantized_cache import CacheFormat, QuantisedCache


@dataclass(frozen=True)
class ThroughCache:
    """A way to read a window, for `mea.evaluate.perplexity.token_losses`.

    Attributes
    ----------
    make_cache
        From the model's configuration to an empty cache.
    block
        Tokens that are fed at once.
    first
        Tokens that the first block has more.
    """

    make_cache: Callable[[Any], Any]
    block: int
    first: int = 0

    @torch.no_grad()
    def __call__(self, model: Any, row: Int[Tensor, " t"]) -> Float[Tensor, " scored"]:
        cache = self.make_cache(model.config)
        losses = []
        edges = [0, *range(self.first + self.block, len(row), self.block), len(row)]
        for begin, end in pairwise(edges):
            logits = model(input_ids=row[None, begin:end], past_key_values=cache, use_cache=True).logits[0]
            targets = row[begin + 1 : end + 1]
            losses.append(cross_entropy(logits[: len(targets)], targets))
        return torch.cat(losses)


def reading_in(bits: CacheFormat | int | None) -> ThroughCache | None:
    """How to read a text over a cache in few bits; None reads it at once, without one.

    Raises
    ------
    ValueError
        As `CacheFormat`.
    """
    if bits is None:
        return None
    form = CacheFormat(bits) if isinstance(bits, int) else bits
    return ThroughCache(lambda config: QuantisedCache(config, form), form.block, form.first)
