"""The Hugging Face Trainer as recovery uses it: two learning rates, the best state kept, steps that can be repeated.

A checkpoint holds only what is trained (and the optimiser's state), gathered from wherever it is sharded.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mea.records import Progress
from mea.train.recovery.parameters import sizes
from mea.train.recovery.settings import Recovery

Point = dict[str, float | int]
WEIGHTS, OPTIMISER, SCHEDULE, BEST = "trained.safetensors", "optimizer.pt", "scheduler.pt", "best.safetensors"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class DivergedError(ValueError):
    """The loss is not a number any more."""


class Windows(Dataset):
    """Rows of tokens in a fixed order."""

    def __init__(self, rows: Int[Tensor, "n t"]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


class _Steps(TrainerCallback):
    def __init__(self, report: Progress | None):
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # the end is a point of the curve, whatever the interval
        if self.report:
            self.report("recovering", state.global_step, state.max_steps)


class RecoveryTrainer(Trainer):
    """Trains a `Distilled` or `LayerOutputs` module.

    Parameters
    ----------
    module
        Takes token ids, gives ``loss``, and while evaluating ``ce`` and perhaps ``kl``.
    factors
        The parameters that train at ``settings.rate``.
    scored
        Gives ``{"ce": ..., "kl": ...}``, the held-out losses of the module as it is.
    folder
        For checkpoints and the best state.
    processes
        That share a batch.
    sharded
        The module went through ``fully_shard``: it is not to be wrapped for data parallelism again.
    """

    model: Any  # transformers allows for each of them to be missing
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        module: nn.Module,
        factors: list[nn.Parameter],
        rows: Int[Tensor, "n t"],
        scored: Callable[[], dict[str, float]],
        settings: Recovery,
        folder: Path,
        *,
        processes: int = 1,
        sharded: bool = False,
        progress: Progress | None = None,
    ):
        self.settings, self.folder, self.scored = settings, folder, scored
        self._factors = {id(parameter) for parameter in factors}
        self._rows = Windows(rows)
        super().__init__(
            module,
            training_arguments(settings, folder, processes),
            train_dataset=self._rows,
            eval_dataset=Windows(rows[:1]),
            callbacks=[_Steps(progress)],
        )
        self.remove_callback(PrinterCallback)
        self.is_distributed_loading_by_transformers = sharded

    @property
    def curve(self) -> list[Point]:
        """Held-out losses so far, the start's first: ``tokens``, ``ce`` and where there is an original ``kl``."""
        found = [entry for entry in self.state.log_history if "held_out_ce" in entry]
        keys = ("tokens", "held_out_ce", "held_out_kl")
        return [{key.removeprefix("held_out_"): entry[key] for key in keys if key in entry} for entry in found]

    @property
    def best(self) -> Point:
        """The point nearest to the original of those that predict the text no worse than the start.

        Without an original, and where the text itself is the objective, the point that predicts it best.
        """
        points = [point for point in self.curve if point["ce"] <= self.curve[0]["ce"]]
        what = "kl" if self.settings.objective != "text" and "kl" in points[0] else "ce"
        return min(points, key=lambda point: point[what])

    @property
    def losses(self) -> list[Point]:
        """Training losses: ``tokens`` and the mean ``loss`` of the steps since the entry before."""
        return [
            {"tokens": entry["step"] * self.settings.step_tokens, "loss": entry["loss"]}
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with one group for the factors and one for the rest."""
        if self.optimizer is None:
            settings = self.settings
            trained = [each for each in self.model.parameters() if each.requires_grad]
            own = [each for each in trained if id(each) in self._factors]
            rest = [each for each in trained if id(each) not in self._factors]
            groups = [{"params": own, "lr": settings.rate}, {"params": rest, "lr": settings.base_lr}]
            if settings.relative:
                size = sizes(self.model)
                groups = [
                    {"params": [each], "lr": group["lr"] * size[each]} for group in groups for each in group["params"]
                ]
            groups = [group for group in groups if group["params"]]
            options: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay, "fused": True}
            self.optimizer = torch.optim.AdamW(groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The module's loss.

        Raises
        ------
        DivergedError
            It is not finite.
        """
        outputs = model(**inputs)
        if not outputs["loss"].isfinite():
            rates = f"{self.settings.rate:g} and {self.settings.base_lr:g}"
            raise DivergedError(
                f"the loss is {outputs['loss'].item()} at step {self.state.global_step + 1} with learning rates "
                f"{rates}: train with lower ones (--rate, --other-rate)"
            )
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out text, and keep the state if none was better."""
        tokens = self.state.global_step * self.settings.step_tokens
        if any(point["tokens"] == tokens for point in self.curve):  # a run that goes on has been here
            return {}
        self.model.eval()
        scores = self.scored()
        self.model.train()
        if not math.isfinite(scores["ce"]):
            raise DivergedError(f"the held-out loss is {scores['ce']} after {tokens:,} tokens: train with lower rates")
        self.log({f"held_out_{name}": value for name, value in scores.items()} | {"tokens": tokens})
        if self.best["tokens"] == tokens:
            self._keep(self.folder / BEST)
        return {}

    def restore_best(self) -> Point:
        """Put the best state seen, the start included, into the model; returns its point of the curve."""
        self._put(self.folder / BEST)
        return self.best

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self._rows)  # the order is the rows' own, on any number of processes

    def _keep(self, path: Path) -> None:
        state = get_model_state_dict(self.model, options=FULL)
        if self.args.should_save:
            part = path.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in _untied(state).items()}, part)
            part.replace(path)

    def _put(self, path: Path) -> None:
        state: dict[str, Any] = load_file(path)
        set_model_state_dict(self.model, state, options=FULL)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._keep(folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._put(Path(resume_from_checkpoint, WEIGHTS))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = get_optimizer_state_dict(self.model, _inner(self.optimizer), options=FULL)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMISER))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint, OPTIMISER), weights_only=True)
            set_optimizer_state_dict(self.model, _inner(self.optimizer), state, options=FULL)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULE), weights_only=True))


def training_arguments(settings: Recovery, folder: Path, processes: int) -> TrainingArguments:
    """The Trainer's own settings.

    Raises
    ------
    ValueError
        The batch cannot be shared evenly by the processes.
    """
    share = settings.batch // processes
    micro = min(settings.micro_batch, share)
    if settings.batch % processes or share % micro:
        raise ValueError(f"a batch of {settings.batch} windows cannot be shared by {processes} processes: change it")
    steps = settings.steps
    every = max(1, round(steps / settings.checkpoints))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=settings.base_lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * steps),
        max_grad_norm=settings.clip,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        eval_strategy="steps",
        eval_steps=max(1, round(steps / settings.evaluations)),
        eval_on_start=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, steps // 500),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        seed=settings.seed,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a folder, the Trainer's state being written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _untied(state: dict[str, Any]) -> dict[str, Tensor]:
    """One name for each tensor: safetensors refuses shared memory."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept
