"""Answers of a model to questions about a context that it reads once: written greedily, and by likelihood.

The context goes into the cache that the model decodes with; questions and answers are read over that cache. Small
models often fail to write an answer whose log-likelihood is still above those of the wrong ones: both are scored.
"""

import copy
import math
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mea.evaluate.long_context.prompts import Prompt, Query, Source
from mea.evaluate.speed import held_bytes
from mea.models.quantized_cache import QuantisedCache

COPIES = 2**29  # bytes that copies of a cache may take, for answers of several tokens


@dataclass(frozen=True)
class Answered:
    """A model's answer to one question, with its scores.

    Attributes
    ----------
    exact
        1 if the first word written is a right one.
    choice
        1 if a right answer is likelier than every wrong one.
    logprob
        Log-likelihood of the right answer in nats; with several right answers, of any of them.
    written
        The text of greedy decoding.
    """

    exact: float
    choice: float
    logprob: float
    written: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Answerer:
    """A model with its tokenizer, and the cache it answers from.

    Parameters
    ----------
    model
        A causal language model of transformers, compressed or not.
    source
        Source of the prompts, with the model's tokenizer.
    cache_bits
        Quantise the cache to 8, 4, 3 or 2 bits; None is an ordinary cache.
    """

    def __init__(self, model: Any, source: Source, cache_bits: int | None = None):
        self.model, self.source, self.cache_bits = model, source, cache_bits

    @torch.no_grad()
    def answer(self, prompt: Prompt) -> tuple[list[Answered], int, int]:
        """Read a prompt and answer its questions.

        Returns
        -------
        answers
            In the order of the questions.
        tokens
            Number of tokens of the context.
        cache_bytes
            Bytes of the cache after the context.

        Raises
        ------
        ValueError
            The model's logits are not numbers.
        """
        ids = self.source.ids(prompt.context)
        if self.source.start is not None:
            ids = [self.source.start, *ids]
        cache = self._empty_cache()
        self._read(ids, cache)
        held = sum(held_bytes(cache))
        answers = []
        for query in prompt.queries:
            last = query is prompt.queries[-1]
            answers.append(self._answer(query, cache if last else copy.deepcopy(cache)))
        return answers, len(ids), held

    @torch.no_grad()
    def seconds_of(self, tokens: int) -> float:
        """Seconds of reading so many tokens; the first reading of a model, which takes longer, is not counted."""
        ids = (self.source.ids(self.source.sentences[0]) * tokens)[:tokens]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            self._read(ids, self._empty_cache())
            times.append(time.perf_counter() - began)
        return min(times[1:])

    def _answer(self, query: Query, cache: Any) -> Answered:
        logits = self._read(self.source.ids(query.ask), cache)
        values = self._likelihoods(query, cache, logits)
        right = len(query.right)
        written = self._write(cache, logits, self.source.new_tokens(query))
        words = re.findall(r"\w+", written.lower())
        exact = bool(words) and words[0] in {word.lower() for word in query.right}
        best = max(values[:right]) > max(values[right:])
        return Answered(float(exact), float(best), torch.tensor(values[:right]).logsumexp(0).item(), written)

    def _likelihoods(self, query: Query, cache: Any, logits: Tensor) -> list[float]:
        """Log-likelihood of each candidate; those of one token are read off the question's last logits."""
        candidates = [self.source.answer(word) for word in query.candidates]
        first = logits.log_softmax(-1)
        values = [first[ids[0]].item() for ids in candidates]
        longer = [i for i, ids in enumerate(candidates) if len(ids) > 1]
        at_once = max(1, COPIES // max(1, sum(held_bytes(cache))))
        for begin in range(0, len(longer), at_once):
            part = longer[begin : begin + at_once]
            width = max(len(candidates[i]) for i in part) - 1
            # Padding stands behind the scored tokens, which do not see it.
            rows = [(candidates[i][:-1] + [0] * width)[:width] for i in part]
            copied = copy.deepcopy(cache)
            copied.batch_repeat_interleave(len(part))
            rows = torch.tensor(rows, device=self.model.device)
            scores = self.model(input_ids=rows, past_key_values=copied, use_cache=True).logits.float().log_softmax(-1)
            for row, i in zip(scores, part, strict=True):
                values[i] += sum(row[at, token].item() for at, token in enumerate(candidates[i][1:]))
        return values

    def _write(self, cache: Any, logits: Tensor, count: int) -> str:
        written: list[int] = []
        end = self.source.tokenizer.eos_token_id
        for _ in range(count):
            token = int(logits.argmax())
            if token == end:
                break
            written.append(token)
            if len(written) < count:
                logits = self._read([token], cache)
        return self.source.tokenizer.decode(written)

    def _read(self, ids: list[int], cache: Any) -> Tensor:
        """Put tokens into the cache; the logits after the last one."""
        row = torch.tensor([ids], device=self.model.device)
        logits = self.model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        logits = logits.float().cpu()
        if not math.isfinite(logits.sum().item()):
            raise ValueError(
                "the model's logits are not finite numbers: its weights or activations overflow; try dtype float32"
            )
        return logits

    def _empty_cache(self) -> Any:
        config = self.model.config.get_text_config()
        return DynamicCache(config=config) if self.cache_bits is None else QuantisedCache(config, self.cache_bits)
