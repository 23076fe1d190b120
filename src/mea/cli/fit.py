"""``mea fit``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.cli import options as shared
from mea.cli.console import output, progress

EXAMPLES = (
    "mea fit RECORDS --record fit.json",
    "mea fit RECORDS --held 0.375 --draws 1000",
)


def fit(
    records: Annotated[list[Path], typer.Argument(help="Records of training runs, or folders of them.")],
    record: Annotated[
        Path | None, typer.Option(help="Write the record of the fit to this file.", rich_help_panel=shared.WHAT)
    ] = None,
    skip: Annotated[
        float, typer.Option(help="Fraction of the tokens at the start that is not fitted.", rich_help_panel=shared.WHAT)
    ] = 0.1,
    held: Annotated[
        float,
        typer.Option(
            help="Fraction of the tokens from which the loss at the end is predicted.", rich_help_panel=shared.WHAT
        ),
    ] = 0.5,
    horizon: Annotated[
        float,
        typer.Option(help="Predict the loss at this multiple of the tokens.", rich_help_panel=shared.WHAT),
    ] = 10.0,
    draws: Annotated[int, typer.Option(help="Bootstrap replicates.", rich_help_panel=shared.ADVANCED)] = 4000,
    seed: shared.Seed = 0,
) -> None:
    """Fit the loss of a sweep: scaling laws, best learning rates, stability, differences, prediction errors."""
    from mea.records import write_record
    from mea.report.render.terminal import TerminalTable
    from mea.report.sections.scaling_fit import fit_parts
    from mea.report.sources import find_records
    from mea.scaling import FitSettings, fit_records

    settings = FitSettings(draws=draws, seed=seed, skip=skip, held=held, horizon=horizon)
    with progress() as report:
        fitted = fit_records(find_records(records), settings, progress=report)
    if record:
        write_record(record, fitted)
    for part in fit_parts(fitted):
        output.print(TerminalTable(part))
