"""``mea pretrain``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.cli import options as shared
from mea.cli.console import output, progress

EXAMPLES = (
    "mea pretrain run.toml OUT",
    "mea pretrain decay.toml OUT --start-from OTHER/checkpoint-1200",
)


def pretrain(
    config: Annotated[Path, typer.Argument(help="TOML file of the run's settings (docs/pretraining.md).")],
    out: Annotated[Path, typer.Argument(help="Folder of the run; an interrupted run continues there.")],
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of a run at a constant learning rate, to continue with a decay.",
            rich_help_panel=shared.WHAT,
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Record to write, by default in OUT.", rich_help_panel=shared.WHAT)
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Folder of tokenised text, shared by runs.", rich_help_panel=shared.ADVANCED)
    ] = Path("build/pretraining/data"),
    device: shared.Device = "auto",
) -> None:
    """Train a model of the attention family from random weights."""
    from mea.ops.device import use_device
    from mea.train.pretraining.record import divergence_message, end_message
    from mea.train.pretraining.run import pretrain as run
    from mea.train.pretraining.settings import read_settings

    use_device(device)
    with progress() as report:
        settings = read_settings(config)
        made = run(settings, out, cache=cache, record=record, start_from=start_from, progress=report)
    if message := divergence_message(made):
        raise ValueError(message)
    output.print(f"{end_message(made)} ({out / 'model'})")
