"""The Hugging Face Trainer as recovery and pretraining share it."""

import errno
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from mea.records import Progress
from mea.train.checkpoints import last_complete, mark_complete
from mea.train.fsdp import full_state, load_full_state

OPTIMIZER = "optimizer"  # folder of a sharded checkpoint for the moments
SCHEDULER = "scheduler.pt"
LITTLE_SPACE = 64 << 20  # bytes free below which torch's failed writes are put down to a full disk


def training_arguments(
    folder: Path, device: torch.device, *, steps: int, rows: int, micro_rows: int | None, **options: Any
) -> Any:
    """The Trainer's arguments for `rows` per step, over all processes.

    Parameters
    ----------
    folder
        Folder of checkpoints.
    device
        Device to train on; with several processes, each one's own GPU.
    micro_rows
        Most rows per forward pass in one process; None for all its rows of a step.
    options
        Further arguments of `transformers.TrainingArguments`.

    Raises
    ------
    ValueError
        The rows cannot be shared out evenly.
    """
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        use_cpu=device.type == "cpu",
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    if args.world_size == 1 and device.type != "cpu":  # the Trainer would take the first GPU, or all of them
        args._n_gpu, args.__dict__["_setup_devices"] = 1, device
        state: Any = args.distributed_state
        state.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    share = max(1, rows // args.world_size)
    micro = min(micro_rows or share, share)
    if rows % (micro * args.world_size):
        raise ValueError(f"a batch of {rows} rows is no multiple of {micro} rows in {args.world_size} processes")
    args.per_device_train_batch_size = micro
    args.gradient_accumulation_steps = rows // (micro * args.world_size)
    return args


@contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """Turn any library's error for a full disk into one that says where the run in this folder continues.

    Raises
    ------
    OSError
        The disk is full: the last complete checkpoint stays.
    """
    try:
        yield
    except Exception as error:  # tokenizers raise no more specific one
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full and not (isinstance(error, RuntimeError) and shutil.disk_usage(run).free < LITTLE_SPACE):
            raise
        kept, _ = last_complete(run)
        state = f"{kept.name} is complete; the run continues from it" if kept else "no checkpoint was written yet"
        raise OSError(errno.ENOSPC, f"no space left on the disk; {state}", str(run)) from error


@contextmanager
def readable(checkpoint: str | None) -> Iterator[None]:
    """Turn any library's error into one that names the checkpoint that cannot be loaded.

    Raises
    ------
    ValueError
        Loading failed.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is in a file decides what a reader raises
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}): it was changed or written by another version; "
            "only tensors and numbers are loaded. Remove it to continue from the previous checkpoint"
        ) from error


class BaseTrainer(Trainer):
    """Rows in their own order, AdamW by groups, and checkpoints that are marked when they are complete.

    Parameters
    ----------
    sharded
        `mea.train.fsdp.shard` was applied: the module must not be wrapped for data parallelism again.
    """

    model: Any  # transformers allows for each of them to be missing
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        sharded: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        super().__init__(model, args, callbacks=[*callbacks, MarkCheckpoints()], **options)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.is_distributed_loading_by_transformers = self.sharded = sharded

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW, each with its ``lr``."""
        raise NotImplementedError

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            args = self.args
            self.optimizer = torch.optim.AdamW(
                self.parameter_groups(), lr=args.learning_rate, weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True,
            )  # fmt: skip
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # The order is the rows' own, on any number of processes.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # pyright: ignore

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.sharded:
            state_dict = full_state(self.model)
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(resume_from_checkpoint):
            if self.sharded:
                load_full_state(self.model, load_file(Path(resume_from_checkpoint, "model.safetensors")))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, _unwrapped(self.optimizer), str(Path(output_dir, OPTIMIZER)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            if checkpoint is None or not self.sharded:
                return super()._load_optimizer_and_scheduler(checkpoint)
            load_optimizer_distributed(self.model, _unwrapped(self.optimizer), str(Path(checkpoint, OPTIMIZER)))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)


class MarkCheckpoints(TrainerCallback):
    """Mark a checkpoint as complete once all processes have written their parts."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class ReportSteps(TrainerCallback):
    """Report the steps done, with tokens per second, and model-FLOPs utilisation where `flops` a step are known."""

    def __init__(self, report: Progress, what: str, tokens: int, flops: int = 0, peak: float = 1.0) -> None:
        self.report, self.what, self.tokens, self.flops, self.peak = report, what, tokens, flops, peak
        self.start, self.first_step = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            steps_per_second = (state.global_step - self.first_step) / (time.perf_counter() - self.start)
            speed = f"{steps_per_second * self.tokens:,.0f} tokens/s"
            if self.flops:
                speed += f", {steps_per_second * self.flops / self.peak:.0%} MFU"
            self.report(f"{self.what} ({speed})", state.global_step, state.max_steps)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
