"""Score continuations with the token eviction of kvpress; run by the Python of an environment that has it.

    python kvpress_run.py FOLDER

The folder holds the request, and gets the results: see `mea.comparison.peers`. Each press is kvpress's own, applied by
its own hooks while the context is read; positions of the continuation are those of the whole text, as in kvpress's
pipeline. Nothing of mea is imported.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging


@torch.no_grad()
def score(model, window, context, press):
    """Losses of the tokens after the continuation's first, and the cache's bytes after the context."""
    cache: Any = DynamicCache()
    with press(model):
        model.model(input_ids=window[None, :context], past_key_values=cache, use_cache=True)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    positions = torch.arange(context, len(window))[None]
    rest = window[context:]
    logits = model(input_ids=rest[None], past_key_values=cache, position_ids=positions, use_cache=True).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1].float(), rest[1:], reduction="none"), held / context


def main(folder):
    """Carry out the request."""
    logging.disable_progress_bar()
    request = json.loads((folder / "request.json").read_text())
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    for number, run in enumerate(request["runs"]):
        try:
            press = getattr(kvpress, run["name"])(compression_ratio=run["ratio"])
            scores = [score(model, window, request["context"], press) for window in tokens]
        except Exception as error:  # one press that cannot run leaves the others theirs
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        else:
            save_file({"losses": torch.stack([losses for losses, _ in scores])}, folder / f"{number}.safetensors")
            result = {"bytes_per_token": sum(size for _, size in scores) / len(scores), "versions": versions}
        (folder / f"{number}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
