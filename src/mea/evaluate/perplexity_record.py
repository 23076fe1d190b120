"""The perplexity of one or two models, given by name, as a record."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mea.evaluate.perplexity import block_means, perplexity, ratio, text_losses
from mea.evaluate.through_cache import check_cache_bits, reading_in
from mea.models.loading import dtype_name, load, load_config, load_tokenizer
from mea.models.processes import join
from mea.records import Progress, Record, make_record
from mea.text import encode_source, load_text, start_token

Losses = Float[Tensor, "windows scored"]


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
    """Perplexity of a model, and its ratio to another model's on the same tokens; one is in memory at a time.

    Parameters
    ----------
    source, against
        Hub ids, folders or GGUF files; see `mea.models.loading.load`.
    text
        Name of a packaged text, or a file; see `mea.text.load_text`.
    window, tokens
        Tokens per window, and of the text's beginning (all of it if None).
    dtype
        Of the computation; ``"auto"`` is that of the weights.
    cache_bits
        Read the text of `source` in blocks over a cache of 8, 4, 3 or 2 bits; `against` is read at once.
    progress
        Called with the stage's name, the windows done and all windows.

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
    check_cache_bits(source, cache_bits)
    load_text(text)  # an error before any model is loaded
    join()
    names, read_as = [name for name in (source, against) if name], []
    for name in names:
        load_config(name)
        tokenizer = load_tokenizer(name)
        read_as.append((start_token(tokenizer), encode_source(tokenizer, text, tokens)))
    (start, ids), (other_start, other_ids) = read_as[0], read_as[-1]
    if start != other_start or not torch.equal(ids, other_ids):
        raise ValueError(
            f"{source} and {against} read the text as different tokens, so that their perplexities cannot be compared"
        )
    read, losses = reading_in(cache_bits), []
    for name in names:
        model, tokenizer = load(name, dtype, progress=progress)
        dtype = dtype_name(model)  # `against` has the same
        what = f"perplexity of {Path(name).name}"
        losses.append(text_losses(model, tokenizer, ids, window, what=what, read=read, progress=progress, shared=True))
        read = None  # `against` is read at once
        del model
    told = [name and (Path(name).name if Path(name).exists() else name) for name in (source, against)]
    config = {"model": told[0], "against": told[1], "text": text, "window": window, "tokens": tokens, "dtype": dtype}
    if cache_bits is not None:
        config["cache_bits"] = cache_bits
    samples = {"block_losses": block_means(losses[0])}
    if against:
        samples["against_block_losses"] = block_means(losses[1])
    return make_record("perplexity", config, results=_results(*losses), samples=samples)


def _results(losses: Losses, against: Losses | None = None) -> dict[str, Any]:
    own = perplexity(losses)
    results = own.as_dict() | {"scored_tokens": own.tokens}
    if against is not None:
        other, relative = perplexity(against), ratio(losses, against)
        results |= {f"against_{name}": value for name, value in other.as_dict().items()} | relative.as_dict("ratio")
    return results
