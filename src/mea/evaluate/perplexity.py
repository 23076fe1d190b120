"""Perplexity of any causal language model of transformers, with its standard error, overall and by position.

The protocol: the text is cut into windows of equal length that do not overlap; what is left over at its end is not
scored. Each window is read from an empty cache. Its first token has no context and is not scored. Where a model's
tokenizer puts a token before every text (``<bos>``), that token opens every window. Losses are ``-ln p`` of the next
token, in fp32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mea.models.lm_head import ROWS, InseparableHeadError, head_logits, last_hidden_states
from mea.models.processes import interleaved, place
from mea.records import Progress
from mea.text import encode_text, load_text, start_token, windows

MEASURED_TEXT = "wikitext-2-test"
FEWEST = 16  # tokens that are measured

Read = Callable[[Any, Tensor], Tensor]  # model and the tokens of a window -> losses of all but the first
BLOCK = 128  # tokens whose losses are averaged before the standard error: neighbours are not independent


@dataclass(frozen=True)
class Estimate:
    """``exp`` of a mean over tokens, with its standard error: a perplexity, or a ratio of two."""

    value: float
    standard_error: float
    tokens: int

    def as_dict(self, name: str = "perplexity") -> dict[str, float]:
        """The value by its name in records, with its standard error."""
        error = "standard_error" if name == "perplexity" else f"{name}_standard_error"
        return {name: self.value, error: self.standard_error}


@dataclass(frozen=True)
class PositionRange:
    """An estimate over the tokens at positions ``start <= p < stop`` of their window, counted from 0."""

    start: int
    stop: int
    estimate: Estimate


@torch.no_grad()
def token_losses(
    model: Any,
    tokens: Int[Tensor, " n"],
    window: int = 1024,
    *,
    start: int | None = None,
    read: Read | None = None,
    what: str = "reading",
    progress: Progress | None = None,
    shared: bool = False,
) -> Float[Tensor, "windows scored"]:
    """Loss of every scored token, one row per window; the last column belongs to position ``window - 1``.

    Parameters
    ----------
    model
        A causal language model of transformers, compressed or not.
    tokens
        The text.
    window
        Tokens per window, `start` included; ``window - 1`` of them are scored.
    start
        Token that opens every window, see `start_token`.
    read
        How a window is read: at once if None, or over a cache (`mea.evaluate.through_cache`).
    what, progress
        Called with `what`, the windows done and all windows.
    shared
        Each process of ``torchrun`` scores some of the windows; all have to call this, and get all losses.

    Raises
    ------
    ValueError
        The text is shorter than a window, the window longer than the model's context or too short to score anything, a
        token is outside the vocabulary, or the model's losses are not numbers.
    """
    _check(model, tokens, window, start)
    rows = windows(tokens, window, start)
    if shared:
        rank, processes = place()
        if len(rows) < processes:
            raise ValueError(f"{len(rows)} windows are fewer than {processes} processes: start fewer")
        rows = rows[rank::processes]
    was_training = model.training
    model.eval()
    losses = []
    try:
        for done, row in enumerate(rows):
            losses.append((read or _window_losses)(model, row.to(model.device)))
            if not losses[-1].isfinite().all():
                raise ValueError(
                    f"the model's losses are not finite numbers in window {done + 1} of {len(rows)}: its weights or "
                    f"activations hold NaN, or overflow in {str(model.dtype).removeprefix('torch.')}"
                )
            if progress:
                progress(what, done + 1, len(rows))
    finally:
        model.train(was_training)
    return interleaved(torch.stack(losses)) if shared else torch.stack(losses)


def text_losses(
    model: Any,
    tokenizer: Any,
    tokens: Int[Tensor, " n"],
    window: int,
    *,
    what: str,
    read: Read | None = None,
    progress: Progress | None = None,
    shared: bool = False,
) -> Float[Tensor, "windows scored"]:
    """`token_losses` of a text in windows that open with the tokenizer's own first token."""
    start = start_token(tokenizer)
    return token_losses(model, tokens, window, start=start, read=read, what=what, progress=progress, shared=shared)


def measured_text(tokenizer: Any, count: int) -> Int[Tensor, " n"] | None:
    """The first `count` tokens of `MEASURED_TEXT`, for a result's card; None for 0.

    Raises
    ------
    ValueError
        There are not so many, or too few to score.
    """
    if not count:
        return None
    if count < FEWEST:
        raise ValueError(f"give 0 tokens of {MEASURED_TEXT} to measure on, or at least {FEWEST}, not {count}")
    return encode_text(tokenizer, load_text(MEASURED_TEXT), count)


def perplexity(losses: Float[Tensor, "windows scored"]) -> Estimate:
    """Exponential of the mean loss."""
    return exp_mean(losses)


def ratio(losses: Float[Tensor, "windows scored"], reference: Float[Tensor, "_ _"]) -> Estimate:
    """Perplexity relative to that of another model on the same tokens.

    The error is that of the differences token by token: far smaller than the two perplexities' errors suggest, because
    what makes a token hard does so for both models.
    """
    return exp_mean(_difference(losses, reference))


def by_position(
    losses: Float[Tensor, "windows scored"],
    edges: Sequence[int] = (0, 1024, 2048, 4096, 8192),
    reference: Float[Tensor, "_ _"] | None = None,
) -> list[PositionRange]:
    """Perplexity, or the ratio to `reference`, of each range of positions between neighbouring edges.

    Raises
    ------
    ValueError
        The edges do not ascend, or reach beyond the window.
    """
    window = losses.shape[1] + 1
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)) or edges[0] < 0 or edges[-1] > window:
        raise ValueError(f"edges must ascend within the window of {window} tokens, not {list(edges)}")
    values = losses if reference is None else _difference(losses, reference)
    columns = {(a, b): values[:, max(a - 1, 0) : b - 1] for a, b in pairwise(edges)}  # position 0 is not scored
    return [PositionRange(a, b, exp_mean(part)) for (a, b), part in columns.items()]


def block_means(losses: Float[Tensor, "windows scored"]) -> list[float]:
    """Mean losses of consecutive blocks of about `BLOCK` tokens: the samples that a record keeps."""
    return [block.mean().item() for block in _blocks(losses)]


def exp_mean(values: Float[Tensor, "windows scored"]) -> Estimate:
    """``exp`` of the mean; its standard error from the scatter of blocks, which may differ in length."""
    if not values.numel():
        raise ValueError("no token is scored in this range")
    mean = values.double().mean()
    blocks = _blocks(values.double() - mean)
    n = len(blocks)
    spread = math.sqrt(sum(block.sum().item() ** 2 for block in blocks) * n / (n - 1)) if n > 1 else math.inf
    try:
        value = math.exp(mean.item())
    except OverflowError:
        raise ValueError(
            f"a mean loss of {mean.item():.0f} nats per token has no perplexity in floating point"
        ) from None
    return Estimate(value, value * spread / values.numel() if n > 1 else 0.0, values.numel())


def _difference(losses: Tensor, reference: Tensor) -> Tensor:
    if losses.shape != reference.shape:
        raise ValueError(f"losses of different texts or windows: {tuple(losses.shape)} and {tuple(reference.shape)}")
    return losses - reference


def _blocks(values: Float[Tensor, "windows scored"]) -> list[Tensor]:
    count = max(1, round(values.shape[1] / BLOCK))
    return [block for row in values for block in row.tensor_split(count)]


def _window_losses(model: Any, row: Int[Tensor, " t"]) -> Float[Tensor, " scored"]:
    """Losses of one window on the CPU, never holding more than `ROWS` rows of logits if the model allows it."""
    targets = row[1:]
    try:
        parts = zip(last_hidden_states(model, row[None])[0, :-1].split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([cross_entropy(head_logits(model, states), ids) for states, ids in parts])
    except InseparableHeadError:
        return cross_entropy(model(input_ids=row[None], use_cache=False).logits[0, :-1], targets)


def cross_entropy(logits: Float[Tensor, "t vocabulary"], targets: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Losses on the CPU, taken in fp32 a few rows at a time."""
    parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([functional.cross_entropy(part.float(), ids, reduction="none") for part, ids in parts]).cpu()


def _check(model: Any, tokens: Tensor, window: int, start: int | None) -> None:
    if window < 2 + (start is not None):
        raise ValueError(f"a window of {window} tokens leaves nothing to score: give a longer window")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise ValueError(
            f"a window of {window:,} tokens is longer than the model's context of {longest:,}: give a shorter window"
        )
    if len(tokens) < window - (start is not None):
        raise ValueError(
            f"the text has {len(tokens):,} tokens, fewer than one window of {window:,}: give a longer text or a "
            "shorter window"
        )
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        outside = low if low < 0 else high
        raise ValueError(
            f"token {outside} is outside the model's vocabulary of {size:,}: the tokenizer belongs to another model"
        )
