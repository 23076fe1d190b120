"""One pretraining run: from settings to a record, by the Hugging Face Trainer; killed at any moment, it goes on."""

import errno
import json
import math
import shutil
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.utils import logging as hf_logging

from mea.models.accounting import training_flops
from mea.models.decoder import MeaForCausalLM
from mea.models.presets import preset
from mea.ops.precision import keep_freed_memory, peak_flops
from mea.records import Record, make_record, write_record
from mea.train.checkpoints import last_complete
from mea.train.fsdp import shard
from mea.train.pretraining.branch import SETTINGS, adopt, branched_at, differing, stored
from mea.train.pretraining.callbacks import MarkCheckpoints, StopDiverged, TellProgress
from mea.train.pretraining.controls import FoldMixing, freeze_mixing
from mea.train.pretraining.dataset import (
    Progress,
    TokenStream,
    TrainingRows,
    ValidationRows,
    collate,
    load_tokenizer,
    prepare,
)
from mea.train.pretraining.settings import PretrainSettings
from mea.train.pretraining.trainer import PretrainTrainer

KIND = "pretraining"
LITTLE_SPACE = 64 << 20  # bytes free below which a failed write is put down to a full disk


def pretrain(
    settings: PretrainSettings,
    out: str | Path,
    *,
    cache: str | Path,
    record: str | Path | None = None,
    start_from: str | Path | None = None,
    progress: Progress | None = None,
) -> Record:
    """Train a model from nothing, or go on with the run that `out` holds; return its record.

    Parameters
    ----------
    settings
        What to do.
    out
        Folder of the run: checkpoints, and at the end ``model`` with its tokenizer and ``record.json``.
    cache
        Folder of tokenised data, shared by runs.
    record
        Where the record goes, if not into `out`.
    start_from
        A checkpoint of a run at a constant rate with the same settings, from which a new run goes on with a schedule
        that decays later (`pretraining.branch`). What was recorded up to there becomes part of the new record.
    progress
        Called with what is done, how much of it and how much there is.

    Raises
    ------
    ValueError
        `out` holds a run with other settings; data too short for a batch; damaged shards; a `start_from` that does not
        fit the settings.
    OSError
        The disk is full: the last whole checkpoint stays.
    """
    keep_freed_memory()
    out = Path(out)
    target = Path(record) if record else out / "record.json"
    out.mkdir(parents=True, exist_ok=True)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    args = training_arguments(settings, out)
    with args.main_process_first():
        _same_settings(settings, out)
        shards = prepare(settings.data, cache, progress)
        checkpoint, broken = last_complete(out)
        if checkpoint is None and start_from is not None:
            checkpoint = adopt(Path(start_from), settings, out)
    if broken:
        warnings.warn(f"{', '.join(broken)} of {out}: not complete, or damaged; removed", stacklevel=2)
    tokenizer = load_tokenizer(shards)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)  # `prepare` refuses a tokenizer without one
    rows, validation = _rows(settings, shards)
    torch.manual_seed(settings.run.seed)
    model = build_model(settings, len(tokenizer), end)
    flops = training_flops(model.config, settings.rows_per_batch, settings.data.row)
    if settings.run.shard:
        model = shard(model, args.world_size, args.device)
    stop = StopDiverged(math.log(len(tokenizer)) + settings.run.divergence, settings.optim.warmup_steps)
    callbacks: list[Any] = [stop, MarkCheckpoints()]
    if settings.run.fold_at is not None:
        callbacks.append(FoldMixing(int(settings.run.fold_at * settings.optim.steps)))
    if progress:
        peak = peak_flops(args.device.type, settings.run.precision)
        callbacks.append(TellProgress(progress, settings.optim.batch_tokens, flops, peak * args.world_size))
    args.eval_on_start = checkpoint is None
    trainer = PretrainTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
        mixer_multiplier=settings.optim.mixer_multiplier,
        validation_batch=args.per_device_train_batch_size,
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    start = time.perf_counter()
    _train(trainer, checkpoint, out)
    made = _record(settings, trainer, stop.reason, model, time.perf_counter() - start)
    made["results"] |= {"incomplete_checkpoints": len(broken), "branched_at_step": branched_at(out)}
    if not stop.reason:
        trainer.save_model(str(out / "model"))  # with the tokenizer
        (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs
    if args.should_save:
        write_record(target, made)
    return made


def divergence_message(record: Record) -> str | None:
    """What to say of a run that diverged; None if it did not."""
    if not record["results"]["diverged"]:
        return None
    return (
        f"the run diverged: {record['results']['reason']}. Its record is written, its last whole checkpoint kept; "
        f"lower the learning rate ({record['config']['learning_rate']:g}) or lengthen the warm-up"
    )


def build_model(settings: PretrainSettings, vocabulary: int, end: int) -> MeaForCausalLM:
    """The model of a run, freshly initialised."""
    config = settings.model.config(vocabulary, end, settings.data.row)
    model = MeaForCausalLM(config)
    if settings.model.freeze_mixing != "no":
        freeze_mixing(model)
    return model


def training_arguments(settings: PretrainSettings, out: Path) -> TrainingArguments:
    """The Trainer's arguments for these settings.

    Raises
    ------
    ValueError
        The batch does not divide by processes and micro-batches.
    """
    optim, run = settings.optim, settings.run
    every = max(1, optim.steps // run.checkpoints)
    kind, options = _schedule(settings)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=optim.steps,
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
        use_cpu=not torch.cuda.is_available(),
        seed=run.seed,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=max(1, optim.steps // run.validations),
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        report_to=list(run.report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=run.fold_at is not None,
    )
    micro = run.micro_batch_rows or max(1, settings.rows_per_batch // args.world_size)
    if settings.rows_per_batch % (micro * args.world_size):
        raise ValueError(
            f"a batch of {settings.rows_per_batch} rows is no multiple of {micro} rows in {args.world_size} processes"
        )
    args.per_device_train_batch_size = micro
    args.gradient_accumulation_steps = settings.rows_per_batch // (micro * args.world_size)
    return args


def _schedule(settings: PretrainSettings) -> tuple[str, dict[str, Any]]:
    optim = settings.optim
    return {
        "constant": ("constant_with_warmup", {}),
        "linear": ("linear", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": optim.final_fraction}),
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": max(1, round(optim.decay_fraction * optim.steps)),
                "min_lr_ratio": optim.final_fraction,
                "decay_type": "linear",
            },
        ),
    }[optim.schedule]


def _rows(settings: PretrainSettings, shards: Path) -> tuple[TrainingRows, ValidationRows]:
    data, count = settings.data, settings.rows_per_batch * settings.optim.steps
    stream = TokenStream(shards, "train")
    rows = TrainingRows(stream, data.row, count, settings.run.seed)
    if rows.available < settings.rows_per_batch:
        raise ValueError(
            f"the training split has {len(stream):,} tokens, {rows.available} rows of {data.row}: less than one batch "
            f"of {settings.rows_per_batch} rows. Give more text or a smaller optim.batch_tokens"
        )
    return rows, ValidationRows(TokenStream(shards, "validation"), data.row, data.validation_tokens)


def _same_settings(settings: PretrainSettings, out: Path) -> None:
    """Refuse to go on with another run's checkpoints."""
    place, given = out / SETTINGS, stored(settings)
    if place.is_file():
        if changed := differing(given, json.loads(place.read_text(encoding="utf-8"))):
            raise ValueError(f"{out} holds a run with other settings ({', '.join(changed)}): choose another folder")
        return
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps(given, indent=1), encoding="utf-8")
    partial.replace(place)


def _train(trainer: PretrainTrainer, checkpoint: Path | None, out: Path) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (OSError, RuntimeError) as error:  # torch and safetensors report a failed write in ways of their own
        full = getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(out).free < LITTLE_SPACE
        if not full:
            raise
        kept, _ = last_complete(out)
        where = f"{kept.name} is whole and will be gone on from" if kept else "no checkpoint was written yet"
        raise OSError(errno.ENOSPC, f"no space left for a checkpoint; {where}", str(out)) from error


def _record(
    settings: PretrainSettings, trainer: PretrainTrainer, reason: str, model: MeaForCausalLM, seconds: float
) -> Record:
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
    inspections = [evaluations[step]["inspection"] for step in losses]
    samples |= {name: [found[name] for found in inspections] for name in inspections[0]} if inspections else {}
    samples = {name: _rounded(values, 6 if "loss" in name else 4) for name, values in samples.items()}
    return make_record(KIND, config, results=results, samples=samples, seeds={"weights_and_order": settings.run.seed})


BLOCKS = 32  # into which a record groups the validation rows


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
