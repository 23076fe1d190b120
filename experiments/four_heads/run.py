"""Compress the model that `train.py` made: to half of its cache by lower ranks, and to a fifth by bits.

Writes one record to ``records/``. Asserts what must hold whatever the figures: the measured bytes of every cache are
those that were asked for, and at full rank every method computes what the original computes.
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
from mea.evaluate.through_cache import reading_in
from mea.models.loading import load
from mea.models.quantized_cache import QuantisedCache
from mea.records import make_record, write_record
from mea.text import encode_text, load_text

HERE = Path(__file__).parent
TEXTS = {"held-out": None, "wikitext-2-test": "wikitext-2-test"}  # neither was trained or calibrated on
RANKED = [name for name, method in METHODS.items() if not method.coded]
CODED = [name for name, method in METHODS.items() if method.coded]
KEEPS, BITS = (0.28, 0.2, 0.14), (4, 2)
CONTEXT = 8192  # of caches in bytes; texts are read in windows as long as those of training


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
        for name in RANKED
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
    for name in RANKED:
        half, full = results[name, 0.5], results[name, 1.0]
        size = cache_size(half.model)
        assert 2 * size.bytes == whole.bytes, f"{name}: {size.bytes} bytes are not half of {whole.bytes}"
        same = full_rank_error(model, full.model, tokens[:1])
        assert same <= TOLERANCE, f"{name} differs by {same} with everything kept"
        measured = losses(half.model)
        figures[name] = {
            "cache_bytes_per_token": size.bytes_per_token,
            "full_rank_error": same,
            "self_check": half.self_check,
            "layer_relative_output_error": half.layers,
            "perplexity": {text: perplexity(loss).value for text, loss in measured.items()},
            "ratio": {text: ratio(loss, original[text]).value for text, loss in measured.items()},
            "ratio_error": {text: ratio(loss, original[text]).standard_error for text, loss in measured.items()},
        }
        samples |= {f"{name} {text}": block_means(loss) for text, loss in measured.items()}
        ratios = ", ".join(f"{text} {value:.3f}" for text, value in figures[name]["ratio"].items())
        print(f"{name}: perplexity times {ratios}")
    packed, more = packed_caches(options, tokens, tests)
    figures |= packed
    samples |= more
    config = {
        "keep": 0.5,
        "packed_keeps": list(KEEPS),
        "packed_context": CONTEXT,
        "kv_heads": 4,
        "scored_tokens": {name: loss.numel() for name, loss in original.items()},
        "window": options.window,
        "calibration_tokens": options.calibration,
        "training": json.loads((options.model / "training.json").read_text(encoding="utf-8"))["settings"],
    }
    seeds = {"training": 0, "calibration": calibration.seed}
    record = make_record("four_heads", config, results=figures, samples=samples, seeds=seeds)
    print(write_record(options.out, record))


def packed_caches(options: Any, tokens: torch.Tensor, tests: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Figures and samples of packed and of quantised caches in bfloat16, with bytes at `CONTEXT` tokens.

    The model's limit is raised to it: rotary positions have none, and the texts stay within what was trained.
    """
    model, _ = load(str(options.model), "bfloat16")
    model.config.max_position_embeddings = CONTEXT
    calibration = Calibration(str(options.model / "seen.txt"), options.calibration, options.window, copy_fraction=0.0)
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    original = {text: token_losses(model, ids, options.window) for text, ids in tests.items()}
    whole = cache_size(model, CONTEXT)

    def add(label: str, measured: dict[str, torch.Tensor], size: Any, **more: Any) -> None:
        figures[label] = {
            "cache_bytes_per_token": size.bytes_per_token,
            "share": size.bytes / whole.bytes,
            "perplexity": {text: perplexity(loss).value for text, loss in measured.items()},
            "ratio": {text: ratio(loss, original[text]).value for text, loss in measured.items()},
            "ratio_error": {text: ratio(loss, original[text]).standard_error for text, loss in measured.items()},
        } | more
        for text, loss in measured.items():
            samples[f"{label} {text}"] = block_means(loss)
        ratios = ", ".join(f"{text} {value:.3f}" for text, value in figures[label]["ratio"].items())
        print(f"{label}: {size.bytes / whole.bytes:.1%} of the bytes, perplexity times {ratios}")

    add("uncompressed in bfloat16", original, whole)
    for bits in BITS:
        read, make = reading_in(bits), lambda config, bits=bits: QuantisedCache(config, bits)
        measured = {text: token_losses(model, ids, options.window, read=read) for text, ids in tests.items()}
        add(f"{bits} bits", measured, cache_size(model, CONTEXT, make))
    plans = {}
    for name in CODED:
        for keep in KEEPS:
            try:
                fields = CompressOptions(keep=keep, method=name, calibration=calibration)
                plans[f"{name} {keep:g}"] = make_plan(model.config, model.dtype.itemsize, fields)
            except ValueError as error:
                figures[f"{name} {keep:g}"] = {"impossible": str(error)}
    results = dict(zip(plans, run_plans(LayerWalk(model), tokens, list(plans.values())), strict=True))
    for label, result in results.items():
        size = cache_size(result.model, CONTEXT)
        asked = float(label.split()[1])
        assert 0.9 * asked < size.bytes / whole.bytes <= asked, f"{label} takes {size.bytes} of {whole.bytes} bytes"
        measured = {text: token_losses(result.model, ids, options.window) for text, ids in tests.items()}
        layout = result.plan.layout.described()
        add(label, measured, size, tiers=layout["tiers"], expected_loss=result.layers)
    return figures, samples


@torch.no_grad()
def full_rank_error(original: Any, compressed: Any, tokens: torch.Tensor) -> float:
    expected = original(input_ids=tokens).logits
    return ((compressed(input_ids=tokens).logits - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


if __name__ == "__main__":
    main()
