"""``mea fit``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import progress


def fit(
    records: Annotated[list[Path], typer.Argument(help="Records of training runs, or folders of them.")],
    out: Annotated[Path | None, typer.Option(help="Write the record of the fit to this file.")] = None,
    draws: Annotated[int, typer.Option(help="Bootstrap replicates.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the replicates.")] = 0,
    skip: Annotated[float, typer.Option(help="Share of the tokens, at the beginning, that is not fitted.")] = 0.1,
    held: Annotated[float, typer.Option(help="Share of the tokens from which the rest is predicted.")] = 0.5,
    horizon: Annotated[float, typer.Option(help="Predict the loss at so many times the tokens.")] = 10.0,
) -> None:
    """Fit loss against tokens over a sweep: best rates, stability, differences, and whether the fit predicts."""
    from mea.records import write_record
    from mea.report.render.terminal import TerminalTable
    from mea.report.sections.scaling_fit import fit_parts
    from mea.report.sources import find_records
    from mea.scaling import FitSettings, fit_records

    settings = FitSettings(draws=draws, seed=seed, skip=skip, held=held, horizon=horizon)
    with progress() as report:
        record = fit_records(find_records(records), settings, progress=report)
    if out:
        write_record(out, record)
    for part in fit_parts(record):
        Console().print(TerminalTable(part))
