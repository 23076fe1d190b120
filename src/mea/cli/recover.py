"""``mea recover``."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import errors, progress


def recover(
    model: Annotated[str, typer.Argument(help="What mea compress wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the result; must not exist, or be empty.")],
    text: Annotated[list[str], typer.Option(help="Text to train on, a file or a packaged one; may be repeated.")],
    original: Annotated[str | None, typer.Option(help="The uncompressed model; cpt does without.")] = None,
    stage: Annotated[str, typer.Option(help="layers, distil, near or cpt; several joined by +.")] = "distil",
    trained: Annotated[str | None, typer.Option(help="factors, attention, all or lora.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each stage; 100,000 by default.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens read in one piece; 512 by default.")] = None,
    copy_fraction: Annotated[
        float | None, typer.Option(help="Share of the windows in which a part is read again; 0.5 with distil and near.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step; 4 by default.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows at a time in one process.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of the factors; for distil and near as a share of each tensor's RMS."),
    ] = None,
    base_lr: Annotated[float | None, typer.Option(help="Of everything else.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Tokens of the texts that choose the best state.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of products: bfloat16 or float32; by default the faster one here.")
    ] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Under torchrun: FSDP2 instead of copies.")] = False,
    measure: Annotated[int, typer.Option(help="WikiText-2 test tokens for the model card; 0: none.")] = 4096,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Train a compressed model for a short while to bring back quality; an interrupted run goes on."""
    from mea.train.recovery.save import recover_to_folder, recovery_seconds
    from mea.train.recovery.settings import recovery

    changes = {
        "trained": trained, "tokens": tokens, "window": window, "copy_fraction": copy_fraction,
        "batch": batch, "micro_batch": micro_batch, "rate": rate, "base_lr": base_lr, "held_out": held_out,
        "precision": precision,
    }  # fmt: skip
    stages = [recovery(name, **changes) for name in stage.split("+")]
    speaks = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one
    if speaks:
        for name, settings in zip(stage.split("+"), stages, strict=True):
            done = settings.steps * settings.step_tokens
            minutes = max(1, round(recovery_seconds(model, settings) / 60))
            errors.print(
                f"{name}: {done:,} tokens in {settings.steps:,} steps, trained: {settings.trained}; in one process "
                f"about {minutes:,} minute{'s' * (minutes != 1)} on this machine if it is quiet"
            )
    if dry_run:
        return
    with progress() as report:
        record = recover_to_folder(
            model, out, stages, text, original=original, sharded=shard, measure_tokens=measure, progress=report
        )
    if speaks:
        start, end = record["results"]["held_out_start"]["ce"], record["results"]["held_out"]["ce"]
        Console().print(f"held-out loss {start:.4f} → {end:.4f} ({out})")
