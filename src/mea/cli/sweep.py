"""``mea sweep``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.cli import options as shared
from mea.cli.console import errors, output, progress

EXAMPLES = (
    "mea sweep sweep.toml RECORDS --text FOLDER_OF_TEXTS",
    "mea sweep sweep.toml RECORDS --workers 2 --minutes 60",
)


def sweep(
    config: Annotated[Path, typer.Argument(help="TOML file of the sweep (docs/pretraining.md).")],
    results: Annotated[Path, typer.Argument(help="Folder of the records; runs that have one are skipped.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on, instead of the file's data.files; may be repeated.", rich_help_panel=shared.WHAT
        ),
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder of tokenised text and unfinished runs.", rich_help_panel=shared.WHAT)
    ] = Path("build/pretraining"),
    minutes: Annotated[
        float | None, typer.Option(help="Start no new run after this many minutes.", rich_help_panel=shared.WHAT)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Parallel runs.", rich_help_panel=shared.ADVANCED)] = 1,
    attempts: Annotated[
        int, typer.Option(min=1, help="Attempts at a run before it counts as failed.", rich_help_panel=shared.ADVANCED)
    ] = 3,
    device: shared.Device = "auto",
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Run on the Ray cluster that this machine belongs to.", rich_help_panel=shared.ADVANCED
        ),
    ] = False,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of a run.", rich_help_panel=shared.ADVANCED)] = 1,
) -> None:
    """Train variants at several learning rates and seeds; an interrupted sweep continues."""
    from mea.ops.device import use_device
    from mea.train.pretraining.sweep import on_ray
    from mea.train.pretraining.sweep import sweep as run
    from mea.train.pretraining.sweep_file import read_sweep

    if not ray:  # its nodes have devices of their own
        use_device(device)
    runs = read_sweep(config, text)
    launch = on_ray(gpus) if ray else None
    with progress() as report:
        counts = run(
            runs,
            results,
            work,
            workers=workers,
            attempts=attempts,
            minutes=minutes,
            progress=report,
            launch=launch,
            device=device,
            note=errors.print,
        )
    output.print(", ".join(f"{count} {what}" for what, count in counts.items()))
