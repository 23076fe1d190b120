"""The record of a pretraining run."""

import math
from itertools import pairwise
from typing import Any

from transformers import Trainer

from mea.models.presets import preset
from mea.records import Record, make_record
from mea.train.pretraining.branch import stored
from mea.train.pretraining.settings import PretrainSettings

KIND = "pretraining"
BLOCKS = 32  # into which a record groups the validation rows


def run_record(settings: PretrainSettings, trainer: Trainer, reason: str, seconds: float) -> Record:
    """The record of a run that ended; `reason` says why if it diverged."""
    model: Any = trainer.model
    history: list[dict[str, Any]] = trainer.state.log_history
    batch = settings.optim.batch_tokens
    steps = [entry for entry in history if "loss" in entry]
    evaluations = {e["step"]: e for e in history if "eval_blocks" in e}
    losses = {step: e["eval_loss"] for step, e in sorted(evaluations.items())}
    done = trainer.state.global_step
    config = {
        **settings.labels,
        "variant": settings.model.variant,
        "preset": settings.model.preset,
        "learning_rate": settings.optim.learning_rate,
        "schedule": settings.optim.schedule,
        "tokens": settings.optim.tokens,
        "warmup_tokens": settings.optim.warmup_tokens,
        "vocabulary": model.config.vocab_size,
        "seed": settings.run.seed,
        "settings": stored(settings),
    }
    plain = preset(settings.model.preset)
    finite = [value for value in losses.values() if math.isfinite(value)]
    results = {
        "diverged": bool(reason),
        "reason": reason,
        "steps": done,
        "validation_loss": None if reason or not finite else finite[-1],
        "initial_loss": losses.get(0),
        "parameters": model.num_parameters(),
        "non_embedding_parameters": model.num_parameters()
        - model.model.embed_tokens.weight.numel() * (1 if plain.tie_word_embeddings else 2),
        "seconds_of_last_start": seconds,
        "processes": trainer.args.world_size,
    }
    samples = {
        "train_loss": [entry["loss"] for entry in steps],
        "grad_norm": [float(entry["grad_norm"]) for entry in steps],
        "validation_tokens": [step * batch for step in losses],
        "validation_loss": list(losses.values()),
        "validation_blocks": [_blocks(evaluations[step]["eval_blocks"]) for step in losses],
    }
    accuracies = [evaluations[step]["accuracy"] for step in losses if "accuracy" in evaluations[step]]
    if settings.data.recall is not None and accuracies:
        config["pairs"] = settings.data.recall.scored_pairs
        samples["accuracy"] = accuracies
        results["accuracy"] = None if reason else sum(accuracies[-1]) / len(accuracies[-1])
    diagnostics = [evaluations[step]["diagnostics"] for step in losses]
    samples |= {name: [entry[name] for entry in diagnostics] for name in diagnostics[0]} if diagnostics else {}
    samples = {name: _rounded(values, 6 if "loss" in name else 4) for name, values in samples.items()}
    return make_record(KIND, config, results=results, samples=samples, seeds={"weights_and_order": settings.run.seed})


def _blocks(rows: list[float]) -> list[float]:
    """Mean losses of neighbouring rows."""
    parts = min(BLOCKS, len(rows))
    cuts = [len(rows) * i // parts for i in range(parts + 1)]
    return [sum(rows[a:b]) / (b - a) for a, b in pairwise(cuts)]


def _rounded(value: Any, digits: int) -> Any:
    """Fewer digits make a record half the size; fp32 losses mean six, and what is not finite is None."""
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def end_message(record: Record) -> str:
    """What a run that did not diverge came to."""
    results = record["results"]
    message = f"validation loss {results['validation_loss']:.4f}"
    return message + (f", accuracy {results['accuracy']:.1%}" if "accuracy" in results else "")


def divergence_message(record: Record) -> str | None:
    """The error message for a run that diverged; None if it did not."""
    if not record["results"]["diverged"]:
        return None
    return (
        f"the run diverged: {record['results']['reason']}. Its record and its last complete checkpoint are kept; "
        f"lower the learning rate ({record['config']['learning_rate']:g}) or lengthen the warm-up"
    )
