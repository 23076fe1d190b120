"""``mea perplexity``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models, check_text
from mea.cli import options as shared
from mea.cli.console import SPEAKS, output, progress
from mea.names import TEXTS

EXAMPLES = (
    "mea perplexity MODEL --text technical --tokens 8192",
    "mea perplexity COMPRESSED --against MODEL --record perplexity.json",
)


def perplexity(
    model: shared.Model,
    against: shared.Against = None,
    text: shared.Text = TEXTS[0],
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens from the start of the text; all by default.", rich_help_panel=shared.MEASUREMENT
        ),
    ] = None,
    window: shared.Window = shared.WINDOW,
    record: Annotated[
        Path | None,
        typer.Option(help="Write the record, with every sample, to this file.", rich_help_panel=shared.WHAT),
    ] = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    cache_bits: shared.CacheBits = None,
) -> None:
    """Measure a model's perplexity on a text, and its ratio to another model's."""
    check_models(model, against)
    check_text(text)
    from mea.evaluate.perplexity_record import perplexity_record
    from mea.ops.device import use_device
    from mea.records import write_record
    from mea.report.sections.compression import perplexity_table

    use_device(device)
    with progress() as report:
        measured = perplexity_record(
            model,
            text=text,
            window=window,
            tokens=tokens,
            against=against,
            dtype=dtype,
            cache_bits=cache_bits,
            progress=report,
        )
    if record and SPEAKS:
        write_record(record, measured)
    output.print(perplexity_table(measured))
