"""Decoding with a whole model at a long context: compressed cache against the uncompressed model in its fastest form.

The uncompressed side is the stock model with each kv head's queries packed into one matrix (`mea.evaluate.speed`).
Both sides go through the same loop with greedy tokens, each with a preallocated cache and weights of its own,
and take turns token by token. The caches are filled with random numbers instead of reading a prompt: speed does not
depend on what they hold.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from timing import in_turns, speedup

from mea.compression.budget import Layout
from mea.compression.convert import LayerFactors, assemble, latent_config
from mea.compression.methods.factors import Factors
from mea.models.cache import PreallocatedCache

CONFIG = {"context": 8192, "dtype": "bfloat16", "keep": 0.5, "repetitions": 3, "rounds": 20, "warmup": 3}
BARS = {1: 1.15, 4: 1.4}  # sequences -> how many times as fast it has to be


def truncated(model: Any, keep: float) -> Any:
    """A compressed model as fast as any other of its size, and good for nothing else: the first channels are cached."""
    width = model.model.layers[0].self_attn.k_proj.out_features
    kept = round(keep * width)
    eye = torch.eye(width, dtype=torch.float64)[:kept]
    factors = LayerFactors(Factors(eye, eye.T), Factors(eye, eye.T))
    layers = model.config.num_hidden_layers
    layout = Layout(((kept, kept),) * layers)
    compressed = assemble(copy.deepcopy(model), [factors] * layers, latent_config(model.config, layout, {}))
    compressed.set_attn_implementation("sdpa")
    return compressed


def filled_cache(model: Any, batch: int, config: dict[str, Any]) -> PreallocatedCache:
    """A cache that holds `context` tokens after the last of the rounds."""
    steps = config["warmup"] + config["rounds"]
    cache = PreallocatedCache(model.config, config["context"])
    model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        tokens = config["context"] - steps - 1
        filling = (torch.randn(tokens, x.shape[-1], dtype=x.dtype) for x in (layer.keys, layer.values))
        layer.update(*(x.expand(*layer.keys.shape[:2], -1, -1) for x in filling))
    return cache


def stepper(model: Any, batch: int, config: dict[str, Any]) -> tuple[Callable[[], None], PreallocatedCache]:
    """A function that decodes one more token of each sequence, and the cache that it adds to."""
    cache = filled_cache(model, batch, config)
    token = torch.ones(batch, 1, dtype=torch.long)

    def step() -> None:
        nonlocal token
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)

    return step, cache


@torch.inference_mode()
def measure(models: dict[str, Any], config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Results and samples of ``{"uncompressed": …, "compressed": …}``: seconds for every token of every repetition."""
    results, samples = {}, {}
    for batch, bar in BARS.items():
        taken: list[dict[str, list[float]]] = []
        sizes = {}
        for repetition in range(config["repetitions"]):
            torch.manual_seed(seed + repetition)
            both = {name: stepper(model, batch, config) for name, model in models.items()}
            works = {name: step for name, (step, _) in both.items()}
            taken.append(in_turns(works, config["rounds"], config["warmup"], seed + repetition))
            for name, (_, cache) in both.items():
                cached = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
                sizes[name] = sum(weight.nbytes for weight in models[name].parameters()) + cached
        together = {name: [seconds for each in taken for seconds in each[name]] for name in models}
        name = f"batch_{batch}"
        samples[name] = together
        results[name] = {
            "speedup": speedup(together["uncompressed"], together["compressed"]),
            "speedup_by_repetition": [median(x["uncompressed"]) / median(x["compressed"]) for x in taken],
            "bar": bar,
            "bytes_read": sizes,
        }
    return {"results": results, "samples": samples}
