"""``mea recover``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models, check_output, check_text
from mea.cli import options as shared
from mea.cli.console import SPEAKS, errors, output, progress
from mea.names import DEFAULT_STAGE, STAGES, TRAINED, listed

EXAMPLES = (
    "mea recover COMPRESSED OUT --original MODEL --text FILE",
    "mea recover COMPRESSED OUT --stage cpt --text FILE --tokens 1000000 --dry-run",
)


# As long as its list of options is.
def recover(
    model: Annotated[str, typer.Argument(help="Folder that mea compress wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the result; must not exist, or be empty.")],
    text: Annotated[
        list[str],
        typer.Option(
            help="Text to train on, a file or a packaged text; may be repeated.",
            show_default=False,
            rich_help_panel=shared.WHAT,
        ),
    ],
    original: Annotated[
        str | None,
        typer.Option(help="The uncompressed model; not needed for the stage cpt.", rich_help_panel=shared.WHAT),
    ] = None,
    stage: Annotated[
        str, typer.Option(help=f"{listed(STAGES)}; several joined by +.", rich_help_panel=shared.WHAT)
    ] = DEFAULT_STAGE,
    trained: Annotated[
        str | None,
        typer.Option(help=f"Parameters to train: {listed(TRAINED)}.", rich_help_panel=shared.WHAT),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each stage; 100,000 by default.", rich_help_panel=shared.TRAINING)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of one window; 512 by default.", rich_help_panel=shared.TRAINING)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows of one step; 4 by default.", rich_help_panel=shared.TRAINING)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of the factors; in distillation relative to each tensor's RMS.",
            rich_help_panel=shared.TRAINING,
        ),
    ] = None,
    base_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of all other weights.", rich_help_panel=shared.TRAINING)
    ] = None,
    copy_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the windows with repeated spans; in distillation 0.5 by default.",
            rich_help_panel=shared.TRAINING,
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(help="Held-out tokens, which select the saved state.", rich_help_panel=shared.TRAINING),
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows per forward pass in one process.", rich_help_panel=shared.ADVANCED)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Dtype of matrix products: bfloat16 or float32; by default the faster one.",
            rich_help_panel=shared.ADVANCED,
        ),
    ] = None,
    device: shared.Device = "auto",
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="With torchrun: shard the model (FSDP2) instead of copying it.",
            rich_help_panel=shared.ADVANCED,
        ),
    ] = False,
    measure: Annotated[
        int,
        typer.Option(help="WikiText-2 test tokens for the model card; 0: none.", rich_help_panel=shared.ADVANCED),
    ] = 4096,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
) -> None:
    """Train a compressed model for a short time to regain quality; an interrupted run continues."""
    check_models(model, original)
    for source in text:
        check_text(source)
    if not dry_run:
        check_output(out)
    from mea.models.loading import load_config
    from mea.ops.device import use_device
    from mea.train.recovery.save import recover_to_folder, recovery_seconds
    from mea.train.recovery.settings import recovery

    use_device(device)
    changes = {
        "trained": trained, "tokens": tokens, "window": window, "copy_fraction": copy_fraction,
        "batch": batch, "micro_batch": micro_batch, "lr": lr, "base_lr": base_lr, "held_out": held_out,
        "precision": precision,
    }  # fmt: skip
    packed = getattr(load_config(model), "cache_code", None) is not None
    stages = [recovery(name, packed=packed, **changes) for name in stage.split("+")]
    if SPEAKS:
        for name, settings in zip(stage.split("+"), stages, strict=True):
            done = settings.steps * settings.step_tokens
            minutes = max(1, round(recovery_seconds(model, settings) / 60))
            errors.print(
                f"{name}: {done:,} tokens in {settings.steps:,} steps, trained: {settings.trained}; in one process "
                f"about {minutes:,} minute{'s' * (minutes != 1)} on this machine when it is idle"
            )
    if dry_run:
        return
    with progress() as report:
        record = recover_to_folder(
            model, out, stages, text, original=original, sharded=shard, measure_tokens=measure, progress=report
        )
    if SPEAKS:
        start, end = record["results"]["held_out_start"]["ce"], record["results"]["held_out"]["ce"]
        output.print(f"held-out loss {start:.4f} → {end:.4f} ({out})")
        if start == end:
            output.print("no state was better than the start: the weights are unchanged; train on more tokens")
