"""``mea perplexity``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import progress
from mea.text import NAMES


def perplexity(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    text: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}, or a .txt or .txt.gz file.")] = NAMES[0],
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 1024,
    tokens: Annotated[int | None, typer.Option(help="Only this many tokens of the text.")] = None,
    against: Annotated[str | None, typer.Option(help="Another model, to give the ratio to.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the weights' own), fast, float32, bfloat16 or float16.")] = "auto",
    cache_bits: Annotated[
        int | None, typer.Option(help="Store the cache in 8, 4 or 2 bits instead of as it is.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the record, with every sample, to this file.")] = None,
) -> None:
    """Perplexity of a model on a text, compressed or not, and its ratio to another model's."""
    from mea.evaluate.perplexity_record import perplexity_record
    from mea.records import write_record
    from mea.report.sections.compression import perplexity_table

    with progress() as report:
        record = perplexity_record(
            model,
            text=text,
            window=window,
            tokens=tokens,
            against=against,
            dtype=dtype,
            cache_bits=cache_bits,
            progress=report,
        )
    if json:
        write_record(json, record)
    Console().print(perplexity_table(record))
