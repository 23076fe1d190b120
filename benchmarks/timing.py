"""Time several pieces of work against each other, and find the limits of the machine they run on.

The pieces take turns in one process, in a new random order every round, so that whatever else the machine does hits all
of them alike; ratios are formed within a round.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

PROBE_BYTES = 2**30  # far larger than any processor's cache
PROBE_ROUNDS = 5


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every piece of work in every round; the k-th samples of all of them belong together."""
    order, samples = random.Random(seed), {name: [] for name in works}
    for round_ in range(warmup + rounds):
        for name in order.sample(list(works), len(works)):
            start = time.perf_counter()
            works[name]()
            elapsed = time.perf_counter() - start
            if round_ >= warmup:
                samples[name].append(elapsed)
    return samples


def speedup(reference: list[float], other: list[float]) -> dict[str, float]:
    """How many times as fast `other` is, from pairs of samples of the same round."""
    pairs = [a / b for a, b in zip(reference, other, strict=True)]
    lower, median, upper = statistics.quantiles(pairs, n=4, method="inclusive")
    return {
        "median": median,
        "lowest": min(pairs),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "highest": max(pairs),
    }


def read_bandwidth(rounds: int = PROBE_ROUNDS) -> list[float]:
    """Bytes per second at which all threads together read memory, once per round."""
    numbers = torch.ones(PROBE_BYTES // 4)
    return [numbers.nbytes / seconds for seconds in in_turns({"sum": numbers.sum}, rounds, 1)["sum"]]


def multiplication_rates(rows: int = 32, width: int = 256, rounds: int = PROBE_ROUNDS) -> dict[str, list[float]]:
    """Floating-point operations per second of products shaped like decoding's: a few queries against many keys.

    Where bf16 is no faster than fp32, the processor has no matrix unit for it (AMX), and attention with many queries
    waits for arithmetic instead of memory.
    """
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        keys, queries = torch.randn(4096, width, dtype=dtype), torch.randn(rows, width, dtype=dtype)
        work = {"product": lambda keys=keys, queries=queries: [torch.mm(keys, queries.T) for _ in range(8)]}
        operations = 8 * 2 * 4096 * rows * width
        name = str(dtype).removeprefix("torch.")
        rates[name] = [operations / seconds for seconds in in_turns(work, rounds, 2)["product"]]
    return rates


def limits() -> dict[str, Any]:
    """Results and samples of the probes."""
    bandwidth, rates = read_bandwidth(), multiplication_rates()
    results = {"read_bytes_per_second": max(bandwidth)}
    results |= {f"{name}_operations_per_second": max(samples) for name, samples in rates.items()}
    results["has_amx"] = torch.cpu._is_amx_tile_supported()
    samples = {"read_bytes_per_second": bandwidth, "load_average": list(os.getloadavg())}
    samples |= {f"{name}_operations_per_second": rate for name, rate in rates.items()}
    return {"results": results, "samples": samples}
