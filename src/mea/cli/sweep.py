"""``mea sweep``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import errors, progress


def sweep(
    config: Annotated[Path, typer.Argument(help="TOML file of the sweep (docs/pretraining.md).")],
    results: Annotated[Path, typer.Argument(help="Folder of the records; runs that have one are skipped.")],
    files: Annotated[list[str] | None, typer.Option(help="Training text, in place of the file's data.files.")] = None,
    work: Annotated[Path, typer.Option(help="Tokenised data and unfinished runs.")] = Path("build/pretraining"),
    workers: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    attempts: Annotated[int, typer.Option(help="Of a run that crashes.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many minutes.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on the Ray cluster this machine belongs to.")] = False,
    gpus: Annotated[float, typer.Option(help="GPUs of a run on Ray.")] = 1,
) -> None:
    """Variants, learning rates and seeds as one set of runs that can be stopped and gone on with."""
    from mea.train.pretraining.sweep import on_ray
    from mea.train.pretraining.sweep import sweep as run
    from mea.train.pretraining.sweep_file import read_jobs

    jobs = read_jobs(config, files)
    launch = on_ray(gpus) if ray else None
    with progress() as report:
        counts = run(
            jobs,
            results,
            work,
            workers=workers,
            attempts=attempts,
            minutes=minutes,
            progress=report,
            launch=launch,
            note=errors.print,
        )
    Console().print(", ".join(f"{count} {what}" for what, count in counts.items()))
