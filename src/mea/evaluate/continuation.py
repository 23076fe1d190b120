"""Losses of a continuation after a context that is in the cache only: how methods that forget tokens are scored too.

A context is read at once, into a cache; what follows is read over that cache. Methods that drop tokens do so when the
context has been read; those that store less of each token do it as ever. The first token of the continuation, which is
predicted before anything is read back, is not scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mea.evaluate.perplexity import cross_entropy


@dataclass(frozen=True)
class Continuation:
    """A way to read a window, for `mea.evaluate.perplexity.token_losses`.

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
            raise ValueError(f"a context of {self.context} leaves nothing to score of a window of {len(row)} tokens")
        config = model.config.get_text_config()
        cache = DynamicCache(config=config) if self.make_cache is None else self.make_cache(config)
        model.base_model(input_ids=row[None, : self.context], past_key_values=cache, use_cache=True)
        logits = model(input_ids=row[None, self.context :], past_key_values=cache, use_cache=True).logits[0]
        return cross_entropy(logits[:-1], row[self.context + 1 :])
