"""Which quantised format suits latents: basis, sharing of scales, block length, first tokens. On validation text.

    python experiments/cache_bits/choose.py COMPRESSED_MODEL --out experiments/cache_bits/records/validation

Every variant is one record, which is not made again.
"""

import argparse
import copy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from balance import balance_latents

from mea.compression.calibrate.text import Calibration, calibration_tokens
from mea.evaluate.perplexity import block_means, perplexity, ratio, token_losses
from mea.evaluate.speed import cache_size
from mea.evaluate.through_cache import reading_in
from mea.models.loading import load
from mea.models.quantized_cache import CacheFormat, QuantisedCache
from mea.records import make_record, read_record, write_record
from mea.text import encode_text, load_text, start_token

BASES = ("given", "post_rope", "balanced")
FOUR = CacheFormat(4)


def variants() -> list[tuple[str, CacheFormat]]:
    """All bases with all ways to share scales, then one setting changed at a time."""
    formats = [
        (basis, replace(FOUR, keys=keys, values=values))
        for basis in BASES
        for keys in ("channel", "token")
        for values in ("channel", "token")
    ]
    for basis in ("given", "balanced"):
        formats += [(basis, replace(FOUR, first=first)) for first in (0, 16)]
        formats += [(basis, replace(FOUR, block=block)) for block in (32, 128)]
        formats += [(basis, replace(FOUR, keys="token", group=group)) for group in (16, 96)]
        formats += [
            (basis, replace(FOUR, bits=8)),
            (basis, replace(FOUR, bits=8, first=0)),
            (basis, replace(FOUR, bits=2)),
        ]
    return formats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", default="wikitext-2-valid")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    options = parser.parse_args()
    model, tokenizer = load(options.model, "float32")
    tokens, start = encode_text(tokenizer, load_text(options.text), options.tokens), start_token(tokenizer)
    windows = calibration_tokens(tokenizer, Calibration(tokens=8192, copy_fraction=0.0))
    models = {}
    for basis in BASES:
        models[basis] = copy.deepcopy(model)
        if basis != "given":
            balance_latents(models[basis], windows, scale=basis == "balanced")
    reference = token_losses(model, tokens, options.window, start=start)
    for basis, form in variants():
        name = f"{basis}-{form.bits}-{form.keys}-{form.values}-{form.block}-{form.first}-{form.group}"
        path = options.out / f"{name}.json"
        if path.is_file():
            print(name, read_record(path)["results"])
            continue
        losses = token_losses(models[basis], tokens, options.window, start=start, read=reading_in(form))
        own, relative = perplexity(losses), ratio(losses, reference)
        size = cache_size(
            copy.deepcopy(model).bfloat16(), options.window, lambda config, f=form: QuantisedCache(config, f)
        )
        results = own.as_dict() | relative.as_dict("ratio") | {"bytes_per_token": size.bytes_per_token}
        config = {"model": options.model, "text": options.text, "tokens": options.tokens, "window": options.window}
        config |= {"basis": basis, "format": asdict(form), "ratio_to": "the same model, nothing quantised"}
        samples = {"block_losses": block_means(losses)}
        write_record(path, make_record("cache_bits", config, results=results, samples=samples, seeds={"rotation": 0}))
        print(name, results, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
