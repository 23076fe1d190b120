"""Half of the bytes in 8, 4 or 2 bits a number, and transformers' own quantised caches, on the reported texts.

    python experiments/cache_bits/measure.py ORIGINAL COMPRESSED --out experiments/cache_bits/records

Every variant on every text is one record, which is not made again. Nothing is chosen here: see choose.py.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from mea.evaluate.perplexity import block_means, perplexity, ratio, token_losses
from mea.evaluate.speed import cache_size
from mea.evaluate.through_cache import ThroughCache, reading_in
from mea.models.loading import load
from mea.models.quantized_cache import QuantisedCache
from mea.records import make_record, write_record
from mea.text import encode_text, load_text, start_token

BLOCK = 64  # of transformers' caches: the exact window, as long as a block of ours


def stock(backend: str, bits: int) -> Callable[[Any], Any]:
    """A maker of transformers' own cache, in groups of 32 as ours."""
    return lambda config: transformers.QuantizedCache(
        backend, config, nbits=bits, q_group_size=32, residual_length=BLOCK, axis_key=1, axis_value=1
    )


# name -> (compressed or not, how it is cached)
VARIANTS: dict[str, tuple[bool, Callable[[Any], Any] | int | None]] = {
    "original": (False, None),
    "half": (True, None),
    "half-8": (True, 8),
    "half-4": (True, 4),
    "original-4": (False, 4),
    "original-8": (False, 8),
    "original-hqq-4": (False, stock("hqq", 4)),
    "half-hqq-4": (True, stock("hqq", 4)),
    "half-2": (True, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("compressed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", default=["wikitext-2-test", "technical"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=1024)
    options = parser.parse_args()
    loaded: dict[str, Any] = {}
    references: dict[tuple[str, bool], torch.Tensor] = {}

    def losses_of(text: str, compressed: bool, read: ThroughCache | None) -> torch.Tensor:
        source = options.compressed if compressed else options.original
        if source not in loaded:
            loaded[source] = load(source, "float32")
        model, tokenizer = loaded[source]
        tokens = encode_text(tokenizer, load_text(text), options.tokens)
        if read is None and (text, compressed) in references:
            return references[text, compressed]
        losses = token_losses(model, tokens, options.window, start=start_token(tokenizer), read=read)
        if read is None:
            references[text, compressed] = losses
        return losses

    for name in options.variants:
        compressed, how = VARIANTS[name]
        for text in options.texts:
            path = options.out / text / f"{name}.json"
            if path.is_file():
                continue
            read = ThroughCache(how, BLOCK) if callable(how) else reading_in(how)
            losses = losses_of(text, compressed, read)
            own, relative = perplexity(losses), ratio(losses, losses_of(text, compressed, None))
            model = loaded[options.compressed if compressed else options.original][0]
            make = how if callable(how) or how is None else lambda config, bits=how: QuantisedCache(config, bits)
            size = cache_size(copy.deepcopy(model).bfloat16(), options.window, make)
            results = own.as_dict() | relative.as_dict("ratio") | {"bytes_per_token": size.bytes_per_token}
            config = {"variant": name, "text": text, "tokens": options.tokens, "window": options.window}
            config |= {"ratio_to": "the same model, nothing quantised", "losses_in": "float32", "bytes_in": "bfloat16"}
            write_record(
                path, make_record("cache_bits", config, results=results, samples={"block_losses": block_means(losses)})
            )
            print(name, text, results, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
