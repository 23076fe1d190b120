"""Losses of a text that is read over a cache, as decoding reads it: they show what the cache drops or rounds.

In one pass over a whole window no token is read back from the cache, so the perplexity does not depend on how the cache
is stored. `ThroughCache` feeds a window in blocks as long as those that the cache quantises together: every token sees
what it would see if the text were decoded token by token. `Continuation` reads a context at once and scores what
follows it, so that methods that drop tokens after the context can be scored too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mea.evaluate.perplexity import cross_entropy
from mea.models.loading import load_config
from mea.models.quantized_cache import CacheFormat, QuantisedCache, check_uncompressed


@dataclass(frozen=True)
class ThroughCache:
    """Reads a window block by block, for `mea.evaluate.perplexity.token_losses`.

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


@dataclass(frozen=True)
class Continuation:
    """Reads a context at once and what follows over its cache, for `mea.evaluate.perplexity.token_losses`.

    The first token after the context is predicted before anything is read back from the cache: it is not scored.

    Attributes
    ----------
    context
        Tokens that are read before the continuation.
    make_cache
        From the model's configuration to an empty cache; an ordinary one if None.
    """

    context: int
    make_cache: Callable[[Any], Any] | None = None

    @torch.no_grad()
    def __call__(self, model: Any, row: Int[Tensor, " t"]) -> Float[Tensor, " scored"]:
        if not 0 < self.context < len(row) - 1:
            raise ValueError(f"a context of {self.context} leaves nothing to score in a window of {len(row)} tokens")
        config = model.config.get_text_config()
        cache = DynamicCache(config=config) if self.make_cache is None else self.make_cache(config)
        model.base_model(input_ids=row[None, : self.context], past_key_values=cache, use_cache=True)
        logits = model(input_ids=row[None, self.context :], past_key_values=cache, use_cache=True).logits[0]
        return cross_entropy(logits[:-1], row[self.context + 1 :])


def reading_in(bits: CacheFormat | int | None) -> ThroughCache | None:
    """How to read a text over a quantised cache; None reads it at once, without a cache.

    Raises
    ------
    ValueError
        As `CacheFormat`.
    """
    if bits is None:
        return None
    form = CacheFormat(bits) if isinstance(bits, int) else bits
    return ThroughCache(lambda config: QuantisedCache(config, form), form.block, form.first)


def check_cache_bits(source: str, bits: int | None) -> None:
    """Refuse cache bits that the model cannot have, before its weights are read; None is an ordinary cache.

    Raises
    ------
    ValueError
        As `CacheFormat`, the model's cache is compressed already, or its configuration cannot be read.
    """
    if bits is not None:
        CacheFormat(bits)
        check_uncompressed(load_config(source).get_text_config())
