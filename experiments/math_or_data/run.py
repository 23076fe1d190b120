"""Losses by domain of four models, compressed or not and trained on or not, and the effects that they come to.

python experiments/math_or_data/run.py WHOLE WHOLE-TRAINED HALF HALF-TRAINED --domain books=FILE
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from problems import problems

from mea.evaluate.paired import LEVEL, bootstrap_means
from mea.evaluate.perplexity import block_means, token_losses
from mea.models.loading import load, load_tokenizer
from mea.records import make_record, read_record, write_record
from mea.text import encode_text, load_text, start_token

ARMS = ("whole", "whole_trained", "half", "half_trained")
TEXTS = {"encyclopaedic": "wikitext-2-valid", "technical": "technical"}
# What each effect is made of, arm by arm.
EFFECTS = {
    "data": (-1, 1, 0, 0),
    "compression": (-1, 0, 1, 0),
    "data, compressed": (0, 0, -1, 1),
    "compression, trained": (0, -1, 0, 1),
    "interaction": (1, -1, -1, 1),
}


def effects(losses: Mapping[str, list[float]]) -> dict[str, Any]:
    """Effects in nats per token from block losses of the four arms, with bootstrap intervals over blocks.

    Raises
    ------
    ValueError
        The arms were not scored on the same blocks.
    """
    if len({len(losses[arm]) for arm in ARMS}) != 1:
        raise ValueError("the four models were not scored on the same blocks")
    blocks = np.array([losses[arm] for arm in ARMS])
    estimates = {}
    for name, weights in EFFECTS.items():
        values = np.array(weights) @ blocks
        low, high = np.quantile(bootstrap_means(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        estimates[name] = {"mean": float(values.mean()), "interval": [float(low), float(high)]}
    return estimates


def same_training(first: str, second: str) -> dict[str, Any]:
    """What both trained models were trained with.

    Raises
    ------
    ValueError
        They were not trained with the same.
    """
    records = [read_record(Path(folder) / "recovery.json") for folder in (first, second)]
    told = [{key: record["config"][key] for key in ("stages", "texts")} | record["seeds"] for record in records]
    if told[0] != told[1]:
        differing = [key for key in told[0] if told[0][key] != told[1].get(key)]
        raise ValueError(f"{first} and {second} were trained differently: {', '.join(differing)}")
    return told[0]


def measure(models: Mapping[str, str], texts: Mapping[str, str], tokens: int, window: int) -> dict[str, Any]:
    """Domain -> arm -> mean losses of blocks; a model is loaded once."""
    ids: dict[str, Any] = {}
    losses: dict[str, Any] = {domain: {} for domain in texts}
    for arm, folder in models.items():
        tokenizer = load_tokenizer(folder)
        own = {domain: encode_text(tokenizer, text, tokens) for domain, text in texts.items()}
        ids = ids or own
        if any(own[domain].tolist() != ids[domain].tolist() for domain in texts):
            raise ValueError(f"{folder} reads the texts as different tokens")
        model, _ = load(folder, "float32")
        for domain in texts:
            token_loss = token_losses(model, ids[domain], window, start=start_token(tokenizer))
            losses[domain][arm] = block_means(token_loss)
            print(f"{domain} {arm}: {token_loss.mean():.4f} nats per token", flush=True)
    return losses


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for arm in ARMS:
        parser.add_argument(arm)
    parser.add_argument("--domain", action="append", default=[], metavar="name=FILE", help="may be repeated")
    parser.add_argument("--tokens", type=int, default=8192, help="of each domain")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the arithmetic problems")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "effects.json")
    options = parser.parse_args()
    if any("=" not in domain for domain in options.domain):
        sys.exit("domains are given as name=file")
    texts = {name: load_text(text) for name, text in TEXTS.items()}
    texts["arithmetic"] = problems(options.tokens // 40, options.seed)
    texts |= {name: load_text(file) for name, file in (domain.split("=", 1) for domain in options.domain)}
    models = {arm: getattr(options, arm) for arm in ARMS}
    training = same_training(options.whole_trained, options.half_trained)
    losses = measure(models, texts, options.tokens, options.window)
    results = {domain: effects(by_arm) for domain, by_arm in losses.items()}
    for domain, estimates in results.items():
        for name, effect in estimates.items():
            low, high = effect["interval"]
            print(f"{domain}, {name}: {effect['mean']:+.4f} ({low:+.4f} to {high:+.4f}) nats per token")
    config = {"models": models, "tokens": options.tokens, "window": options.window, "training": training}
    seeds = {"problems": options.seed, "bootstrap": 0}
    write_record(options.record, make_record("math or data", config, results=results, samples=losses, seeds=seeds))


if __name__ == "__main__":
    main()
