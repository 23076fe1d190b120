"""Records as a run of several methods would write them; the numbers are made up."""

from collections.abc import Callable
from typing import Any

import pytest

from mea.records import Record, make_record

EDGES = [(0, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
PLAIN = {"wikitext-2-test": 23.2, "technical": 13.1}


def comparison(method: str, ratio: float, keep: float | None = 0.5, **changes: Any) -> Record:
    compressed = method != "none"

    def text(name: str) -> dict[str, Any]:
        value = PLAIN[name] * ratio
        errors = {
            "standard_error": 0.04 * value,
            "ratio": ratio,
            "ratio_standard_error": 0.012 * ratio if compressed else 0.0,
        }
        return {"perplexity": value, "window": 1024, "tokens": 19437} | errors

    results = {
        "texts": {name: text(name) for name in PLAIN},
        "position_text": "wikitext-2-test",
        "positions": [
            {"start": a, "stop": b, "perplexity": 20 * ratio, "standard_error": 0.8 * ratio}
            | {"ratio": ratio * (1 + b / 100_000), "ratio_standard_error": 0.03 * ratio}
            for a, b in EDGES
        ],
        "cache": {"bytes_per_token": 46080 * ((keep or 1) if compressed else 1), "tokens": 256},
        "decode": {"context": 4096, "dtype": "bfloat16", "batch": 1, "seconds": 0.0612 if compressed else 0.0718}
        | {"ratio": 0.852 if compressed else 1.0, "ratio_low": 0.84, "ratio_high": 0.871},
        "continuation": {"prompt": "The capital of France is", "text": f" Paris, said {method} <b>loudly</b>."},
    }
    if compressed:
        results["compress_seconds"] = 41.7
        layers = [ratio * (0.01 + 0.004 * ((7 * i) % 5)) for i in range(30)]
        results["layers"] = {"what": "added loss, one layer at a time (nats per token)", "values": layers}
    config = {
        "model": "SmolLM2-135M",
        "method": method,
        "keep": keep if compressed else None,
        "calibration_tokens": 12288,
    }
    return make_record("comparison", config, results=results | changes, seeds={"calibration": 0})


@pytest.fixture
def run() -> Callable[[], list[Record]]:
    def make() -> list[Record]:
        methods = {"svd": 1106.4, "gram": 2.71, "pre_rope": 1.938, "post_rope": 1.527}
        return [*(comparison(name, ratio) for name, ratio in methods.items()), comparison("none", 1.0)]

    return make


@pytest.fixture
def one() -> Callable[..., Record]:
    return comparison
