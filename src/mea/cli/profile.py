"""``mea profile``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models, check_text
from mea.cli import options as shared
from mea.cli.console import errors, output, progress
from mea.names import BASELINES

EXAMPLES = (
    "mea profile MODEL profile.json",
    "mea profile MODEL profile.json --keep 0.25 --text technical --tokens 8192",
)


def profile(
    model: shared.Model,
    record: Annotated[Path, typer.Argument(help="Record to write, a .json file; an interrupted run continues there.")],
    keep: Annotated[
        float,
        typer.Option(
            parser=shared.fraction,
            metavar="<float>",
            help="Fraction of its cache that the compressed layer keeps.",
            rich_help_panel=shared.BUDGET,
        ),
    ] = 0.5,
    method: Annotated[str, typer.Option(help=shared.RANKED_HELP, rich_help_panel=shared.METHOD)] = BASELINES[0],
    calibration_text: shared.CalibrationText = shared.CALIBRATION_TEXT,
    calibration_tokens: shared.CalibrationTokens = shared.CALIBRATION_TOKENS,
    calibration_window: shared.CalibrationWindow = shared.CALIBRATION_WINDOW,
    copy_fraction: shared.CopyFraction = shared.COPY_FRACTION,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to score; by default the rest of the calibration text.", rich_help_panel=shared.MEASUREMENT
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the scored text.", rich_help_panel=shared.MEASUREMENT)] = 4096,
    window: shared.Window = shared.WINDOW,
    dtype: shared.Dtype = "fast",
    device: shared.Device = "auto",
) -> None:
    """Compress one layer at a time, and show how much loss each layer's compression adds."""
    check_models(model)
    for source in filter(None, (calibration_text, text)):
        check_text(source)
    from mea.compression import Calibration, CompressOptions
    from mea.compression.profile import describe_cost
    from mea.compression.profile import profile as run
    from mea.ops.device import use_device
    from mea.report.sections.profile import profile_table

    use_device(device)
    calibration = Calibration(calibration_text, calibration_tokens, calibration_window, copy_fraction=copy_fraction)
    errors.print(describe_cost(model, tokens, window), highlight=False)
    with progress() as report:
        measured = run(
            model, record, CompressOptions(keep=keep, method=method, calibration=calibration),
            text=text, tokens=tokens, window=window, dtype=dtype, progress=report,
        )  # fmt: skip
    output.print(profile_table(measured))
    output.print(f"Plot it with: mea report {record} --out profile.html", soft_wrap=True, highlight=False)
