"""Short training after compression, which regains most of the quality lost by compression.

`recover` trains a model in memory, `recover_to_folder` a model on disk, with checks, model card and record. Both run on
one process, or on several under ``torchrun`` (data parallel, or sharded with FSDP2).
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from mea.models.latent_attention import MODEL_TYPE_PREFIX
from mea.ops.precision import keep_freed_memory
from mea.records import Progress
from mea.train.checkpoints import last_complete
from mea.train.fsdp import full_state, shard
from mea.train.recovery.loss import Distilled
from mea.train.recovery.parameters import choose, factors, merged
from mea.train.recovery.settings import Recovery
from mea.train.recovery.trainer import Point, RecoveryTrainer
from mea.train.trainer import disk_errors


@dataclass(frozen=True)
class Recovered:
    """Result of one stage.

    Attributes
    ----------
    model
        The given model in its best state, for LoRA with the updates merged. For a sharded model a whole copy, on the
        first process only.
    curve
        Held-out losses in nats per token: ``tokens`` trained on, ``ce``, and ``kl`` to the original if there is one.
    best
        The point of the curve with the state of `model`.
    losses
        Training losses by ``tokens``.
    seconds
        Time in this process; after an interruption, without the time before it.
    """

    model: Any
    curve: list[Point]
    best: Point
    losses: list[Point]
    seconds: float


def recover(
    student: Any,
    original: Any | None,
    rows: Int[Tensor, "n t"],
    held_out: Int[Tensor, "m t"],
    settings: Recovery,
    folder: Path,
    *,
    sharded: bool = False,
    progress: Progress | None = None,
) -> Recovered:
    """Train a compressed model in place for one stage, and return it in its best state, which may be the start.

    It is trained on the device that it is on.

    Parameters
    ----------
    student
        A compressed model, in fp32.
    original
        The uncompressed model; None for plain pretraining. It is frozen and moved to the student's device in place;
        weights with the same values as the student's are shared in memory afterwards.
    rows, held_out
        Windows to train on and held-out windows: `mea.train.recovery.data.windows`.
    folder
        For checkpoints. If it holds checkpoints of the same stage, training continues from the last.
    sharded
        Shard the student over the processes (FSDP2) instead of copying it to each; the original is copied.

    Raises
    ------
    ValueError
        The model is not compressed, the original is missing or is another model, or sharding has only one process.
    DivergedError
        The loss is NaN or infinite.
    """
    check_pair(student.config, getattr(original, "config", None), settings)
    keep_freed_memory()
    start = time.perf_counter()
    trained = choose(student, settings)
    own = getattr(trained, "get_base_model", lambda: trained)()
    if original is not None:
        original.requires_grad_(False).eval().to(own.device)
        share_frozen(own, original)
    if settings.less_memory:
        own.gradient_checkpointing_enable({"use_reentrant": False})
    kl, ce = (1.0, settings.ce) if settings.objective == "logits" else (0.0, 1.0)
    module: Any = Distilled(own, original, kl=kl, ce=ce)
    if sharded:
        shard(module, own.model.layers)
    score = partial(held_out_losses, module, held_out, settings, progress)
    trainer = RecoveryTrainer(module, list(factors(own).values()), rows, score, settings, folder, progress)
    with trainer.args.main_process_first():
        checkpoint, _ = last_complete(folder)
    with disk_errors(folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    best = trainer.restore_best()
    if settings.less_memory:
        own.gradient_checkpointing_disable()
    model = gathered(module, own) if sharded else merged(trained)
    if model is not None:
        model.requires_grad_(True).eval()
    return Recovered(model, trainer.curve, best, trainer.losses, time.perf_counter() - start)


def check_pair(own: Any, other: Any | None, settings: Recovery) -> None:
    """Refuse models that cannot be trained, judged by the configurations of the compressed model and the original.

    Raises
    ------
    ValueError
        The model is not compressed, or the original is missing, compressed or another model.
    """
    if not own.model_type.startswith(MODEL_TYPE_PREFIX):
        raise ValueError(f"this {own.model_type} model is not compressed: give a folder that `mea compress` wrote")
    if other is None:
        if settings.objective != "text":
            raise ValueError(f"the objective {settings.objective!r} needs the uncompressed model")
        return
    if other.model_type.startswith(MODEL_TYPE_PREFIX):
        raise ValueError("the original is itself compressed: give the uncompressed model")
    same = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads")
    differing = [f"{name} {getattr(other, name)}, not {getattr(own, name)}" for name in same
                 if getattr(other, name) != getattr(own, name)]  # fmt: skip
    if other.model_type != own.model_type.removeprefix(MODEL_TYPE_PREFIX):
        differing.insert(0, f"it is a {other.model_type}")
    if differing:
        raise ValueError(f"the original is not the model that was compressed: {'; '.join(differing)}")


@torch.no_grad()
def held_out_losses(
    module: Any, held_out: Int[Tensor, "m t"], settings: Recovery, progress: Progress | None = None
) -> dict[str, float]:
    """Mean cross-entropy, and divergence from the original if there is one, in nats per token."""
    sums = {"ce": 0.0, "kl": 0.0}
    parts = held_out.split(settings.micro_batch)
    device = next(module.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        for done, part in enumerate(parts, start=1):
            losses = module(input_ids=part.to(device))
            for name in sums:
                sums[name] += losses[name].item() * len(part) / len(held_out)
            if progress:
                progress("scoring held-out text", done, len(parts))
    window = held_out.shape[1]
    sums["ce"] *= window / (window - 1)  # the last token of a window has no next one
    if module.original is None:
        del sums["kl"]
    return sums


def share_frozen(student: Any, original: Any) -> None:
    """Share the original's weights with equal frozen weights of the student, which halves the memory."""
    original_weights = dict(original.named_parameters())
    for name, parameter in student.named_parameters():
        other = original_weights.get(name)
        if not parameter.requires_grad and other is not None and torch.equal(parameter, other):
            parameter.data = other.data


def gathered(module: Any, student: Any) -> Any | None:
    """The whole of a sharded student on the first process; None on the others."""
    state = full_state(module)
    if dist.get_rank():
        return None
    whole = type(student)(student.config).to(student.device)
    own = {name.removeprefix("student."): tensor for name, tensor in state.items()}
    missing, unexpected = whole.load_state_dict(own, strict=False)
    whole.tie_weights()
    lost = set(missing) - set(whole.all_tied_weights_keys)
    if lost or unexpected:
        raise RuntimeError(f"gathering left out {sorted(lost)} and brought {sorted(unexpected)}")
    return whole


def describe(settings: Recovery) -> dict[str, Any]:
    """A stage as a record holds it."""
    return {**asdict(settings), "steps": settings.steps}
