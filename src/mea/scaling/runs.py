"""Pretraining records as runs, and runs as the cells of a grid of arms and learning rates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mea.records import Record

KIND = "pretraining"
CONSTANT = "constant"
BASELINE = "transformer"  # the arm that others are compared to stands first
# Variants that are arms under their own name: what is mixed, and whether there is a norm.
FACTORS: dict[str, dict[str, Any]] = {
    "transformer": {"mixing": "none", "norm": False},
    "groupnorm": {"mixing": "none", "norm": True},
    "mea_keys_no_norm": {"mixing": "k", "norm": False},
    "mea_keys": {"mixing": "k", "norm": True},
    "mea_values_no_norm": {"mixing": "v", "norm": False},
    "mea_values": {"mixing": "v", "norm": True},
    "mea_no_norm": {"mixing": "kv", "norm": False},
    "mea": {"mixing": "kv", "norm": True},
}


@dataclass(frozen=True)
class Run:
    """One training run, as far as the analysis needs it.

    `tokens` and `losses` are the evaluations that gave a finite loss, `blocks` the same by block of the validation
    text.
    """

    arm: str
    lr: float
    seed: int
    schedule: str
    preset: str
    planned: int
    loss: float  # at the end; the initial loss if the run diverged
    initial: float
    diverged: bool
    warmup: int
    tokens: NDArray
    losses: NDArray
    blocks: NDArray | None
    train_loss: NDArray
    grad_norm: NDArray
    factors: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one learning rate and schedule, sorted by seed."""

    arm: str
    lr: float
    schedule: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def finals(self) -> NDArray:
        """Final validation losses, in the order of the seeds."""
        return np.array([run.loss for run in self.runs])

    @property
    def diverged(self) -> bool:
        return any(run.diverged for run in self.runs)

    def curves(self) -> tuple[NDArray, NDArray]:
        """Tokens ``[n]`` and losses ``[seeds, n]`` at the evaluations that all runs that did not diverge share."""
        runs = [run for run in self.runs if not run.diverged and len(run.tokens)]
        if not runs:
            return np.empty(0), np.empty((0, 0))
        shared = sorted(set.intersection(*(set(run.tokens.tolist()) for run in runs)))
        rows = [dict(zip(run.tokens.tolist(), run.losses.tolist(), strict=True)) for run in runs]
        return np.array(shared), np.array([[row[t] for t in shared] for row in rows])


def read_runs(records: Iterable[Record]) -> list[Run]:
    """The runs among records of any kind.

    Raises
    ------
    ValueError
        None is of the kind ``"pretraining"``, or one lacks a field.
    """
    records = list(records)
    pretraining = [record for record in records if record["kind"] == KIND]
    if not pretraining:
        kinds = ", ".join(sorted({record["kind"] for record in records})) or "none"
        raise ValueError(f"no record of the kind {KIND!r} among {len(records)} (kinds found: {kinds})")
    return [_run(record) for record in pretraining]


def cells_of(runs: Sequence[Run]) -> list[Cell]:
    """Runs grouped by arm, schedule and learning rate; arms as they first appear, but the baseline first.

    Raises
    ------
    ValueError
        Two runs have the same arm, learning rate, schedule and seed, or runs of different presets or lengths are mixed.
    """
    shapes = sorted({(run.preset, run.planned) for run in runs})
    if len(shapes) > 1:
        shown = ", ".join(f"{preset} for {planned:,} tokens" for preset, planned in shapes)
        raise ValueError(f"runs can be compared at one preset and length only; here are {shown}: fit them separately")
    groups: dict[tuple[str, str, float], dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault((run.arm, run.schedule, run.lr), {})
        if run.seed in seeds:
            raise ValueError(
                f"two runs of {run.arm} at learning rate {run.lr:g}, {run.schedule}, seed {run.seed}: remove one record"
            )
        seeds[run.seed] = run
    arms = sorted(dict.fromkeys(run.arm for run in runs), key=lambda arm: arm != BASELINE)  # stable
    ordered = sorted(groups, key=lambda key: (arms.index(key[0]), key[1] != CONSTANT, key[1], key[2]))
    return [Cell(arm, lr, schedule, _by_seed(groups[arm, schedule, lr])) for arm, schedule, lr in ordered]


def _by_seed(runs: Mapping[int, Run]) -> tuple[Run, ...]:
    return tuple(runs[seed] for seed in sorted(runs))


def _run(record: Record) -> Run:
    config, results, samples = record["config"], record["results"], record["samples"]
    arm = str(config.get("arm") or config.get("variant"))
    name = f"the pretraining record of {record['date']}"
    for key in ("variant", "learning_rate", "tokens"):
        if config.get(key) is None:
            raise ValueError(f"{name} has no config.{key}")
    seed = config.get("seed", next(iter(record["seeds"].values()), 0))
    tokens = np.array(samples.get("validation_tokens") or [], float)
    losses = _floats(samples.get("validation_loss"))
    if len(tokens) != len(losses):
        raise ValueError(f"{name} has {len(tokens)} validation_tokens for {len(losses)} losses")
    kept = np.isfinite(losses) & (tokens > 0)
    blocks = np.array(samples["validation_blocks"], float) if samples.get("validation_blocks") else None
    final = results.get("validation_loss")
    diverged = bool(results.get("diverged")) or final is None
    initial = results.get("initial_loss")
    if initial is None:
        before = losses[tokens == 0]
        initial = float(before[0]) if len(before) else math.log(config.get("vocabulary") or math.inf)
    if diverged and not math.isfinite(initial):
        raise ValueError(f"{name} diverged and has neither results.initial_loss nor config.vocabulary")
    return Run(
        arm=arm,
        lr=float(config["learning_rate"]),
        seed=int(seed),
        schedule=str(config.get("schedule", CONSTANT)),
        preset=str(config.get("preset", "")),
        planned=int(config["tokens"]),
        loss=float(initial if diverged or final is None else final),
        initial=float(initial),
        diverged=diverged,
        warmup=int(config.get("warmup_tokens") or 0),
        tokens=tokens[kept],
        losses=losses[kept],
        blocks=blocks[kept] if blocks is not None and len(blocks) == len(tokens) else None,
        train_loss=_floats(samples.get("train_loss")),
        grad_norm=_floats(samples.get("grad_norm")),
        factors=FACTORS.get(arm, {}) | {key: config[key] for key in ("mixing", "norm") if key in config},
    )


def _floats(values: Sequence[float | None] | None) -> NDArray:
    return np.array([math.nan if value is None else value for value in values or []], float)
