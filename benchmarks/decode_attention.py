"""Attention of one new token over a long cache: latents read absorbed, against the uncompressed cache.

The uncompressed side is the fastest way that PyTorch has on a processor: a preallocated head-major cache
``[b, g, t, d]``, and each kv head's queries as the rows of one matrix (``enable_gqa`` reads the cache once per query
instead). The compressed side includes the products at both ends that absorbed reading costs.

A model has one cache per layer and comes back to the first only after reading all others, so the caches of several
layers are read in turn: more bytes than the processor's own cache holds.
"""

from typing import Any

import torch
from timing import in_turns, speedup
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mea.ops.latent import absorb, read, unmix

CONFIG = {
    "tokens": 32_768,
    "kv_heads": 4,
    "head_dim": 128,
    "latent_width": 256,
    "dtype": "bfloat16",
    "batch": 1,
    "layers": 16,
    "rounds": 15,
    "warmup": 2,
}
BARS = {1: 1.35, 8: 2.0}  # queries per kv head -> how many times as fast it has to be


def uncompressed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    b, h, q, d = queries.shape
    return scaled_dot_product_attention(queries.view(b, keys.shape[1], -1, d), keys, values).view(b, h, q, d)


def absorbed(queries: Tensor, keys: Tensor, values: Tensor, key_decoder: Tensor, value_decoder: Tensor) -> Tensor:
    b, h, q, d = queries.shape
    packed = absorb(queries, key_decoder).reshape(b, 1, h * q, -1)
    output = read(packed, keys, values, d**-0.5)
    return unmix(output.view(b, h, q, -1), value_decoder)


@torch.inference_mode()
def measure(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Results and samples: seconds per layer, one sample for each pass over all layers."""
    torch.manual_seed(seed)
    dtype, layers = getattr(torch, config["dtype"]), config["layers"]
    b, t, g, d, r = (config[name] for name in ("batch", "tokens", "kv_heads", "head_dim", "latent_width"))
    full = [(torch.randn(b, g, t, d, dtype=dtype), torch.randn(b, g, t, d, dtype=dtype)) for _ in range(layers)]
    latents = [(torch.randn(b, 1, t, r, dtype=dtype), torch.randn(b, 1, t, r, dtype=dtype)) for _ in range(layers)]
    decoders = [torch.randn(g, d, r, dtype=dtype) / r**0.5 for _ in range(2)]
    results, samples = {}, {}
    for queries_per_head, bar in BARS.items():
        queries = torch.randn(b, g * queries_per_head, 1, d, dtype=dtype)
        works = {
            "uncompressed": lambda queries=queries: [uncompressed(queries, *cache) for cache in full],
            "absorbed": lambda queries=queries: [absorbed(queries, *cache, *decoders) for cache in latents],
        }
        taken = in_turns(works, config["rounds"], config["warmup"], seed)
        taken = {name: [seconds / layers for seconds in values] for name, values in taken.items()}
        name = f"queries_per_kv_head_{queries_per_head}"
        samples[name] = taken
        results[name] = {
            "speedup": speedup(taken["uncompressed"], taken["absorbed"]),
            "bar": bar,
            "bytes_read": {
                "uncompressed": sum(x.nbytes for x in full[0]),
                "absorbed": sum(x.nbytes for x in latents[0]),
            },
        }
    return {"results": results, "samples": samples}
