"""Score continuations with the latents of cacheshrink; run by the Python of an environment that has it.

    python cacheshrink_run.py FOLDER

The folder holds the request, and gets the results: see `mea.comparison.peers`. The model is converted by cacheshrink's
own function, calibrated on the texts that this package calibrates on. A window is read in one pass, in which a latent
gives the same keys as out of a cache: cacheshrink 0.1.5 reads a cached key at the angles of a base of 10,000 whatever
the model's, where transformers keeps the base in ``rope_parameters``. Bytes are those of a real cache after the
context. Nothing of mea is imported.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cacheshrink  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.utils import logging


@torch.no_grad()
def score(model, window, context):
    """Losses of the tokens after the continuation's first."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, context:-1]
    return torch.nn.functional.cross_entropy(logits.float(), window[context + 1 :], reduction="none")


@torch.no_grad()
def held(model, tokens):
    """Bytes per token of the cache that is left after reading."""
    cache: Any = DynamicCache()
    model(input_ids=tokens[None], past_key_values=cache, use_cache=True)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / len(tokens)


def main(folder):
    """Carry out the request."""
    logging.disable_progress_bar()
    request = json.loads((folder / "request.json").read_text())
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    texts = request["calibration"]
    versions = {name: version(name) for name in ("cacheshrink", "transformers", "torch")}
    for number, run in enumerate(request["runs"]):
        try:
            model, _ = cacheshrink.convert_to_mla(
                request["model"], compression_ratio=1 / (1 - run["ratio"]), compression_method=run["name"],
                device="cpu", dtype=torch.float32, calibration_texts=texts, num_calibration_samples=len(texts),
                max_calibration_length=request["calibration_window"], trust_remote_code=False, verbose=False,
            )  # fmt: skip
            model = model.eval().to(getattr(torch, request["dtype"]))
            losses = torch.stack([score(model, window, request["context"]) for window in tokens])
            size = held(model, tokens[0, : request["context"]])
        except Exception as error:  # one method that cannot run leaves the others theirs
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        else:
            save_file({"losses": losses}, folder / f"{number}.safetensors")
            result = {"bytes_per_token": size, "versions": versions}
        (folder / f"{number}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
