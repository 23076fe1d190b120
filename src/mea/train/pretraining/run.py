"""One pretraining run by the Hugging Face Trainer, from settings to a record; an interrupted run continues."""

import math
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging as hf_logging

from mea.models.accounting import parameters, training_flops
from mea.models.decoder import MeaForCausalLM
from mea.models.saving import follow_umask, writing
from mea.ops.device import used_device
from mea.ops.precision import keep_freed_memory, peak_flops
from mea.records import Progress, Record, write_record
from mea.train.checkpoints import last_complete
from mea.train.fsdp import shard
from mea.train.pretraining.branch import adopt, branched_at, check_same_run, write_settings
from mea.train.pretraining.callbacks import StopDiverged
from mea.train.pretraining.controls import FoldMixing, freeze_mixing
from mea.train.pretraining.record import run_record
from mea.train.pretraining.settings import PretrainSettings
from mea.train.pretraining.source import Source, open_source
from mea.train.pretraining.trainer import PretrainTrainer
from mea.train.trainer import ReportSteps, disk_errors, training_arguments


def pretrain(
    settings: PretrainSettings,
    out: str | Path,
    *,
    cache: str | Path,
    record: str | Path | None = None,
    start_from: str | Path | None = None,
    progress: Progress | None = None,
) -> Record:
    """Train a model from random weights, or continue the run in `out`; return its record.

    It is trained on the device of `mea.ops.device.use_device`.

    Parameters
    ----------
    settings
        Settings of the run.
    out
        Folder of the run: checkpoints, and at the end ``model`` with its tokenizer and ``record.json``.
    cache
        Folder of tokenised data, shared by runs.
    record
        File of the record; by default in `out`.
    start_from
        A checkpoint of a run at a constant learning rate with the same settings, from which a new run continues with a
        schedule that decays later (`pretraining.branch`). The new record includes the old run's samples.

    Raises
    ------
    ValueError
        Another process writes `out`, or it holds a run with other settings; data too short for a batch; damaged shards;
        a `start_from` that does not fit the settings.
    OSError
        The disk is full: the last complete checkpoint stays.
    """
    out = Path(out)
    with writing(out, out, "checkpoint-*"):
        return _pretrain(settings, out, cache, record, start_from, progress)


def _pretrain(
    settings: PretrainSettings,
    out: Path,
    cache: str | Path,
    record: str | Path | None,
    start_from: str | Path | None,
    progress: Progress | None,
) -> Record:
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    with disk_errors(out):
        args = _arguments(settings, out)
        _check_memory(settings, args.world_size, args.device)
        with args.main_process_first():
            check_same_run(settings, out)
            source = open_source(settings, cache, progress)
        trainer, stop = _trainer(settings, args, source, progress)
        with args.main_process_first():
            checkpoint, incomplete = last_complete(out)
            if checkpoint is None and start_from is not None:
                checkpoint = adopt(Path(start_from), settings, out)
            write_settings(settings, out)
    if incomplete:
        warnings.warn(f"{', '.join(incomplete)} of {out}: not complete, or damaged; removed", stacklevel=2)
    args.eval_on_start = checkpoint is None
    start = time.perf_counter()
    with disk_errors(out):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        result = run_record(settings, trainer, stop.reason, time.perf_counter() - start)
        result["results"] |= {"incomplete_checkpoints": len(incomplete), "branched_at_step": branched_at(out)}
        if not stop.reason:
            trainer.save_model(str(out / "model"))  # with the tokenizer
            (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs
            if args.should_save:
                follow_umask(out / "model")
        if args.should_save:
            write_record(record or out / "record.json", result)
    return result


def _trainer(
    settings: PretrainSettings, args: TrainingArguments, source: Source, progress: Progress | None
) -> tuple[PretrainTrainer, StopDiverged]:
    """The trainer of a run, and the callback that knows why it ended early."""
    optim = settings.optim
    torch.manual_seed(settings.run.seed)
    model = build_model(settings, source.vocabulary, source.end)
    flops = training_flops(model.config, settings.rows_per_batch, settings.data.row)
    if settings.run.shard:
        shard(model, model.model.layers)
    stop = StopDiverged(math.log(source.vocabulary) + settings.run.divergence, optim.warmup_steps)
    callbacks: list[TrainerCallback] = [stop]
    if settings.run.fold_at is not None:
        callbacks.append(FoldMixing(int(settings.run.fold_at * optim.steps)))
    if progress:
        peak = peak_flops(args.device.type, settings.run.precision) * args.world_size
        callbacks.append(ReportSteps(progress, "steps", optim.batch_tokens, flops, peak))
    trainer = PretrainTrainer(
        model,
        args,
        train_dataset=source.rows,
        eval_dataset=source.validation,
        processing_class=source.tokenizer,
        callbacks=callbacks,
        mixer_multiplier=optim.mixer_multiplier,
    )
    return trainer, stop


def _check_memory(settings: PretrainSettings, processes: int, device: torch.device) -> None:
    """Refuse a model that cannot fit: fp32 weights, gradients and two moments have 16 bytes a parameter."""
    count = parameters(settings.model.config(settings.data.model_vocabulary, 0, settings.data.row))
    needed = 16 * count // (processes if settings.run.shard else 1)
    cuda = device.type == "cuda"
    have = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    if needed > have:
        raise ValueError(
            f"training {count:,} parameters takes {needed / 2**30:,.0f} GiB in each process, and this machine has "
            f"{have / 2**30:,.0f}: choose a smaller model"
        )


def build_model(settings: PretrainSettings, vocabulary: int, end: int) -> MeaForCausalLM:
    """The model of a run, freshly initialised."""
    config = settings.model.config(vocabulary, end, settings.data.row)
    model = MeaForCausalLM(config)
    if settings.model.freeze_mixing != "no":
        freeze_mixing(model)
    return model


def _arguments(settings: PretrainSettings, out: Path) -> TrainingArguments:
    optim, run = settings.optim, settings.run
    kind, options = _schedule(settings)
    return training_arguments(
        out,
        used_device(),
        steps=optim.steps,
        rows=settings.rows_per_batch,
        micro_rows=run.micro_batch_rows,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_epsilon=optim.epsilon,
        max_grad_norm=optim.clip,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        warmup_steps=optim.warmup_steps,
        bf16=run.precision == "bfloat16",
        torch_compile=run.compile,
        seed=run.seed,
        logging_steps=run.log_every,
        eval_steps=max(1, optim.steps // run.validations),
        save_steps=max(1, optim.steps // run.checkpoints),
        report_to=list(run.report_to),
        ddp_find_unused_parameters=run.fold_at is not None,
    )


def _schedule(settings: PretrainSettings) -> tuple[str, dict[str, Any]]:
    optim = settings.optim
    return {
        "constant": ("constant_with_warmup", {}),
        "linear": ("linear", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": optim.final_fraction}),
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": optim.decay_steps,
                "min_lr_ratio": optim.final_fraction,
                "decay_type": "linear",
            },
        ),
    }[optim.schedule]
