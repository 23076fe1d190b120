"""Measure models by name and write down what came out, as records."""

from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mea.evaluate.perplexity import Read, block_means, perplexity, ratio, token_losses
from mea.evaluate.through_cache import reading_in
from mea.models.loading import load
from mea.records import Progress, Record, make_record
from mea.text import encode_text, load_text, start_token


def text_losses(
    model: Any,
    tokenizer: Any,
    tokens: Int[Tensor, " n"],
    window: int,
    *,
    what: str,
    read: Read | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "windows scored"]:
    """`token_losses` of a text as `tokenizer` opens it; `progress` is told `what` is being done."""
    report = None if progress is None else partial(progress, what)
    return token_losses(model, tokens, window, start=start_token(tokenizer), read=read, progress=report)


def perplexity_record(
    source: str,
    *,
    text: str = "wikitext-2-test",
    window: int = 1024,
    tokens: int | None = None,
    against: str | None = None,
    dtype: str = "auto",
    cache_bits: int | None = None,
    progress: Progress | None = None,
) -> Record:
    """Perplexity of a model, and its ratio to that of another one on the same tokens.

    Models are loaded one after the other: only one is in memory.

    Parameters
    ----------
    source, against
        Hub ids, folders or GGUF files; see `mea.models.loading.load`.
    text
        Name of a shipped text, or a file; see `mea.text.load_text`.
    window, tokens
        Tokens per window, and of the text's beginning (all of it if None).
    dtype
        To compute in; ``"auto"`` is that of the weights.
    cache_bits
        Read the text of `source` in blocks over a cache in so many bits; `against` is read at once.
    progress
        Called with what is being done, the windows done and the windows in all.

    Returns
    -------
    Record
        Of the kind ``"perplexity"``: ``results`` maps ``perplexity``, ``standard_error``, ``scored_tokens``, and with
        `against` also ``against_perplexity``, ``against_standard_error``, ``ratio``, ``ratio_standard_error``;
        ``samples`` maps ``block_losses`` (and ``against_block_losses``) to mean losses of consecutive blocks of tokens.

    Raises
    ------
    ValueError, OSError
        What loading, reading and measuring raise; or the two models read the text as different tokens.
    """
    reading = reading_in(cache_bits)
    content = load_text(text)
    first: Any = None
    measured = []
    for place, name in enumerate(filter(None, (source, against))):
        model, tokenizer = load(name, dtype)
        ids, start = encode_text(tokenizer, content, tokens), start_token(tokenizer)
        if first is None:
            first = ids, start
        elif start != first[1] or ids.tolist() != first[0].tolist():
            raise ValueError(
                f"{source} and {name} read the text as different tokens, so that their perplexities cannot be compared"
            )
        report = None if progress is None else partial(progress, f"perplexity of {name}")
        read = reading if place == 0 else None  # both may be the same model
        measured.append(token_losses(model, ids, window, start=start, read=read, progress=report))
        del model
    estimate = perplexity(measured[0])
    results = {
        "perplexity": estimate.value,
        "standard_error": estimate.standard_error,
        "scored_tokens": estimate.tokens,
    }
    samples = {"block_losses": block_means(measured[0])}
    if against:
        other, relative = perplexity(measured[1]), ratio(*measured)
        results |= {"against_perplexity": other.value, "against_standard_error": other.standard_error}
        results |= {"ratio": relative.value, "ratio_standard_error": relative.standard_error}
        samples["against_block_losses"] = block_means(measured[1])
    config = {"model": source, "against": against, "text": text, "window": window, "tokens": tokens, "dtype": dtype}
    if cache_bits is not None:
        config["cache_bits"] = cache_bits
    return make_record("perplexity", config, results=results, samples=samples)
