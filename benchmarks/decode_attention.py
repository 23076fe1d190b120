"""Attention of one new token over a long cache: packed codes against the uncompressed cache.

The uncompressed side is the fastest way that PyTorch has on a processor: a preallocated head-major cache
``[b, g, t, d]``, and each kv head's queries as the rows of one matrix (``enable_gqa`` reads the cache once per query
instead). The packed side is all that a layer does between its projections: RoPE of the query, exact tokens, absorbing
and un-mixing included. Codes are random numbers: speed does not depend on what they hold.

A model has one cache per layer and comes back to the first only after reading all others, so the caches of several
layers are read in turn: more bytes than the processor's own cache holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from timing import in_turns, speedup
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mea.ops import cpu
from mea.ops.codes import bits_per_token, group_sizes

CONFIG = {
    "tokens": 32_768,
    "kv_heads": 4,
    "head_dim": 128,
    "exact": [4, 64],  # first and newest tokens
    # Numbers of components with 8, 4 and 2 bits, a fifth of the bytes: shares as `mea compress` gives SmolLM2's layers.
    "predictive": [[48, 176, 288], [0, 80, 432]],
    "joint": [[96, 288, 544]],
    "dtype": "bfloat16",
    "batch": 1,
    "layers": 16,
    "rounds": 15,
    "warmup": 2,
}
QUERIES = (1, 8)  # per kv head
BARS = {"predictive": 1.5}  # how many times as fast as the uncompressed cache it has to be


def uncompressed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    b, h, q, d = queries.shape
    return scaled_dot_product_attention(queries.view(b, keys.shape[1], -1, d), keys, values).view(b, h, q, d)


def packed(name: str, config: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], int]:
    """A layer's reading of a packed cache of random codes, and the bytes that it reads."""
    b, t, g, d = (config[name] for name in ("batch", "tokens", "kv_heads", "head_dim"))
    tiers, (first, recent) = config[name], config["exact"]
    groups = [group for part in tiers for group in group_sizes(part)]
    width, n = sum(map(sum, tiers)), t - first - recent
    codes = torch.randint(0, 256, (b, n, sum(bits * size // 8 for bits, size in groups)), dtype=torch.uint8)
    scales = torch.randn(b, n, 2 * len(groups)).bfloat16()
    exact = [cpu.Exact(*torch.randn(2, b, g, count, d).bfloat16()) for count in (recent, first)]
    pairs = sum(tiers[0]) // 2
    maps = (torch.randn(g, d), torch.randn(g, d, width).bfloat16() / width, torch.randn(g, d))
    if name == "predictive":
        reader = cpu.PackedReader(groups, torch.randn(g, pairs, 2) / pairs, *maps, torch.arange(pairs) % (d // 2))
    else:
        reader = cpu.PackedReader(groups, torch.randn(g, d, width).bfloat16() / width, *maps)
    turn = 10000.0 ** (torch.arange(d // 2) / (d // 2))

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[:, None] / turn
        return angle.cos(), angle.sin()

    blocks, near = angles(torch.arange(0, n, 64.0)), angles(torch.arange(first + recent + 0.0))
    tables = cpu.Angles((blocks[0][None], blocks[1][None]), angles(torch.arange(64.0)), (near[0][None], near[1][None]))

    def read(queries: Tensor) -> Tensor:
        return reader.read(queries[:, :, 0], exact[0], exact[1], codes, scales, 0, n, None, tables, d**-0.5)

    assert 8 * (codes.shape[-1] + 2 * scales.shape[-1]) == sum(map(bits_per_token, tiers))
    return read, codes.nbytes + scales.nbytes + sum(x.nbytes for both in exact for x in both)


@torch.inference_mode()
def measure(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Results and samples: seconds per layer, one sample for each pass over all layers."""
    torch.manual_seed(seed)
    layers = config["layers"]
    b, t, g, d = (config[name] for name in ("batch", "tokens", "kv_heads", "head_dim"))
    full = [torch.randn(2, b, g, t, d).bfloat16() for _ in range(layers)]
    sides = {name: [packed(name, config) for _ in range(layers)] for name in ("predictive", "joint")}
    sizes = {"uncompressed": full[0].nbytes} | {name: readers[0][1] for name, readers in sides.items()}
    results, samples = {}, {}
    for queries_per_head in QUERIES:
        queries = torch.randn(b, g * queries_per_head, 1, d).bfloat16()
        works: dict[str, Callable[[], Any]] = {
            "uncompressed": lambda queries=queries: [uncompressed(queries, *cache) for cache in full]
        }
        for name, readers in sides.items():
            works[name] = lambda queries=queries, readers=readers: [read(queries) for read, _ in readers]
        taken = in_turns(works, config["rounds"], config["warmup"], seed)
        taken = {name: [seconds / layers for seconds in values] for name, values in taken.items()}
        name = f"queries_per_kv_head_{queries_per_head}"
        samples[name] = taken
        results[name] = {
            "speedup": {side: speedup(taken["uncompressed"], taken[side]) for side in sides},
            "bars": BARS,
            "bytes_read": sizes,
        }
    return {"results": results, "samples": samples}
