"""Decoding with a whole model at a long context: packed caches against the uncompressed model in its fastest form.

The uncompressed side is the stock model with each kv head's queries packed into one matrix (`mea.evaluate.speed`).
All sides go through the same loop with greedy tokens, each with a cache and weights of its own, and take turns token
by token. One more side is the uncompressed model with its whole cache in 4 bits. The caches are filled with random
numbers instead of reading a prompt: speed does not depend on what they hold.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from timing import in_turns, speedup
from transformers import DynamicCache

from mea.evaluate.speed import held_bytes
from mea.models.cache import PreallocatedCache
from mea.models.quantized_cache import QuantisedCache

CONFIG = {"context": 8192, "dtype": "bfloat16", "repetitions": 3, "rounds": 20, "warmup": 3}
BATCHES = (1, 4)
BARS = {"predictive": 1.0, "joint": 1 / 1.8}  # how many times as fast as the uncompressed model each reading has to be


def filled_cache(model: Any, batch: int, config: dict[str, Any], bits: int | None = None) -> Any:
    """A cache that holds `context` tokens after the last of the rounds: packed, in `bits`, or preallocated."""
    tokens = config["context"] - config["warmup"] - config["rounds"] - 1
    packed = getattr(model.config, "cache_code", None) is not None
    cache = DynamicCache(config=model.config) if packed else PreallocatedCache(model.config, config["context"])
    if bits:
        cache = QuantisedCache(model.config, bits)
    model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    for layer, decoder in zip(cache.layers, model.model.layers, strict=True):
        attention, whole = decoder.self_attn, packed or bits
        heads, width = (layer.keys.shape[1], layer.keys.shape[-1]) if not whole else (
            attention.k_proj.out_features // attention.head_dim, attention.head_dim
        )  # fmt: skip
        filling = [torch.randn(tokens, width, dtype=model.dtype).expand(batch, heads, -1, -1) for _ in range(2)]
        if packed:
            layer.append(*filling, attention.code.encode)
        else:
            layer.update(*filling)
    return cache


def stepper(model: Any, batch: int, config: dict[str, Any], bits: int | None = None) -> tuple[Callable[[], None], Any]:
    """A function that decodes one more token of each sequence, and the cache that it adds to."""
    cache = filled_cache(model, batch, config, bits)
    token = torch.ones(batch, 1, dtype=torch.long)

    def step() -> None:
        nonlocal token
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)

    return step, cache


@torch.inference_mode()
def measure(models: dict[str, Any], config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Results and samples of ``{"uncompressed": …, name: …}``: seconds for every token of every repetition."""
    results, samples = {}, {}
    codes = {name: getattr(model.config, "cache_code", None) for name, model in models.items()}
    bars = {name: BARS[code["reading"]] for name, code in codes.items() if code}
    for batch in BATCHES:
        taken: list[dict[str, list[float]]] = []
        sizes = {}
        for repetition in range(config["repetitions"]):
            torch.manual_seed(seed + repetition)
            sides = {name: stepper(model, batch, config) for name, model in models.items()}
            sides["4 bits"] = stepper(models["uncompressed"], batch, config, bits=4)
            works = {name: step for name, (step, _) in sides.items()}
            taken.append(in_turns(works, config["rounds"], config["warmup"], seed + repetition))
            for name, (_, cache) in sides.items():
                weights = models.get(name, models["uncompressed"]).parameters()
                sizes[name] = sum(weight.nbytes for weight in weights) + sum(held_bytes(cache))
        together = {name: [seconds for each in taken for seconds in each[name]] for name in taken[0]}
        others = [name for name in together if name != "uncompressed"]
        name = f"batch_{batch}"
        samples[name] = together
        results[name] = {
            "speedup": {side: speedup(together["uncompressed"], together[side]) for side in others},
            "speedup_by_repetition": {
                side: [median(x["uncompressed"]) / median(x[side]) for x in taken] for side in others
            },
            "bars": bars,
            "bytes_read": sizes,
        }
    return {"results": results, "samples": samples}
