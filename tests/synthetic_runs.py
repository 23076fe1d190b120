"""Pretraining records of synthetic runs whose constants are known."""

from functools import cache

import numpy as np

from mea.records import Record, make_record

FINAL = 4_000_000
TRUTH = {"alpha": 0.4, "scale": 1e6, "floor": 2.0}


def synthetic(
    arm: str,
    lr: float,
    seed: int,
    *,
    shift: float = 0.0,
    noise: float = 0.002,
    schedule: str = "constant",
    spike: bool = False,
    diverged: bool = False,
    key: int = 0,
    **config,
) -> Record:
    """A run whose loss follows the law, moved by `shift`, its seed's offset and noise of neighbouring evaluations."""
    shared = np.random.default_rng([seed, key])
    own = np.random.default_rng([seed, key, round(1e6 * lr), sum(map(ord, arm))])
    tokens = np.linspace(FINAL / 30, FINAL, 30)
    offset = noise * shared.standard_normal() + noise / 4 * own.standard_normal()
    wiggle = noise / 2 * own.standard_normal(30)
    law = (TRUTH["scale"] / tokens) ** TRUTH["alpha"] + TRUTH["floor"] + shift
    losses = law * np.exp(offset + wiggle)
    train = 2.5 + 3 * np.exp(-np.arange(600) / 60) + 0.02 * own.standard_normal(600)
    if spike:
        train[450:456] += 2.0
    final = None if diverged else float(losses[-1])
    settings = {"variant": arm, "learning_rate": lr, "seed": seed, "schedule": schedule, "tokens": FINAL}
    return _empty() | {
        "config": settings | {"preset": "1m"} | config,
        "results": {"validation_loss": final, "diverged": diverged, "initial_loss": 7.6},
        "samples": {
            "validation_tokens": tokens.tolist(),
            "validation_loss": losses.tolist(),
            "train_loss": train.tolist(),
        },
        "seeds": {"run": seed},
    }


@cache
def _empty() -> Record:
    """Made once: asking git for the commit and packages for their versions takes longer than everything else here."""
    return make_record("pretraining", {})


def sweep(key: int = 0, seeds: int = 3) -> list[Record]:
    """Two arms over four rates: `b` is lower by 0.05, has its best learning rate one higher, and blows up later."""
    records = []
    for arm, best, gain in (("a", 1, 0.0), ("b", 2, -0.05)):
        for index, lr in enumerate((1e-3, 3e-3, 1e-2, 3e-2)):
            for seed in range(seeds):
                options = {"shift": gain + 0.06 * (index - best) ** 2, "spike": index == best + 1, "key": key}
                records.append(synthetic(arm, lr, seed, diverged=index > best + 1, **options))
    return records
