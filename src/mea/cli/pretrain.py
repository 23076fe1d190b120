"""``mea pretrain``."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import progress


def pretrain(
    config: Annotated[Path, typer.Argument(help="TOML file of the run's settings (docs/pretraining.md).")],
    out: Annotated[Path, typer.Argument(help="Folder of the run; one that was interrupted goes on.")],
    cache: Annotated[Path, typer.Option(help="Tokenised data, shared by runs.")] = Path("build/pretraining/data"),
    record: Annotated[Path | None, typer.Option(help="Where the record goes, if not into OUT.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint of a run at a constant rate, to go on with a decay.")
    ] = None,
) -> None:
    """Train a model of the attention family from nothing."""
    from mea.train.pretraining.run import divergence_message
    from mea.train.pretraining.run import pretrain as run
    from mea.train.pretraining.settings import read_settings

    with progress() as report:
        settings = read_settings(config)
        made = run(settings, out, cache=cache, record=record, start_from=start_from, progress=report)
    if message := divergence_message(made):
        raise ValueError(message)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        Console().print(f"validation loss {made['results']['validation_loss']:.4f} ({out / 'model'})")
