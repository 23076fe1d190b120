"""Compress the model that `train.py` made from 4 kv heads' worth of cache to 2, with every method, at equal bytes.

Writes one record to ``records/``. Asserts what must hold whatever the figures: the measured bytes of every cache are
half of the original's, and at full rank every method computes what the original computes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import Calibration, calibration_tokens
from mea.compression.convert import TOLERANCE
from mea.compression.methods import METHODS
from mea.compression.options import CompressOptions
from mea.compression.plan import make_plan
from mea.evaluate.perplexity import block_means, perplexity, ratio, token_losses
from mea.evaluate.speed import cache_size
from mea.models.loading import load
from mea.records import make_record, write_record
from mea.text import encode_text, load_text

HERE = Path(__file__).parent
TEXTS = {"held-out": None, "wikitext-2-test": "wikitext-2-test"}  # neither was trained or calibrated on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("build/four_heads"), help="what train.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "four_heads.json")
    parser.add_argument("--tokens", type=int, default=20480, help="scored per text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=16384, help="calibration tokens")
    options = parser.parse_args()

    model, tokenizer = load(str(options.model))
    assert model.config.num_key_value_heads == 4
    calibration = Calibration(str(options.model / "seen.txt"), options.calibration, options.window, copy_fraction=0.0)
    tokens = calibration_tokens(tokenizer, calibration)
    texts = {name: load_text(packaged or options.model / f"{name}.txt") for name, packaged in TEXTS.items()}
    tests = {name: encode_text(tokenizer, text)[: options.tokens] for name, text in texts.items()}

    def losses(measured: Any) -> dict[str, torch.Tensor]:
        return {name: token_losses(measured, ids, options.window) for name, ids in tests.items()}

    plans = {
        (name, keep): make_plan(
            model.config, model.dtype.itemsize, CompressOptions(keep=keep, method=name, calibration=calibration)
        )
        for name in METHODS
        for keep in (0.5, 1.0)
    }
    results = dict(zip(plans, run_plans(LayerWalk(model), tokens, list(plans.values())), strict=True))
    original, whole = losses(model), cache_size(model)
    figures: dict[str, Any] = {
        "uncompressed": {
            "cache_bytes_per_token": whole.bytes_per_token,
            "perplexity": {name: perplexity(loss).value for name, loss in original.items()},
        }
    }
    samples = {f"uncompressed {name}": block_means(loss) for name, loss in original.items()}
    for name in METHODS:
        half, full = results[name, 0.5], results[name, 1.0]
        size = cache_size(half.model)
        assert 2 * size.bytes == whole.bytes, f"{name}: {size.bytes} bytes are not half of {whole.bytes}"
        same = full_rank_error(model, full.model, tokens[:1])
        assert same <= TOLERANCE, f"{name} differs by {same} with everything kept"
        measured = losses(half.model)
        figures[name] = {
            "cache_bytes_per_token": size.bytes_per_token,
            "full_rank_error": same,
            "self_check": half.errors,
            "layer_relative_output_error": half.lost,
            "perplexity": {text: perplexity(loss).value for text, loss in measured.items()},
            "ratio": {text: ratio(loss, original[text]).value for text, loss in measured.items()},
            "ratio_error": {text: ratio(loss, original[text]).standard_error for text, loss in measured.items()},
        }
        samples |= {f"{name} {text}": block_means(loss) for text, loss in measured.items()}
        ratios = ", ".join(f"{text} {value:.3f}" for text, value in figures[name]["ratio"].items())
        print(f"{name}: perplexity times {ratios}")
    config = {
        "keep": 0.5,
        "kv_heads": 4,
        "scored_tokens": {name: loss.numel() for name, loss in original.items()},
        "window": options.window,
        "calibration_tokens": options.calibration,
        "training": json.loads((options.model / "training.json").read_text(encoding="utf-8"))["settings"],
    }
    seeds = {"training": 0, "calibration": calibration.seed}
    record = make_record("four_heads", config, results=figures, samples=samples, seeds=seeds)
    print(write_record(options.out, record))


@torch.no_grad()
def full_rank_error(original: Any, compressed: Any, tokens: torch.Tensor) -> float:
    expected = original(input_ids=tokens).logits
    return ((compressed(input_ids=tokens).logits - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


if __name__ == "__main__":
    main()
