"""Options that several commands share, with one name, meaning and help text each, and the panels of the help."""

from typing import Annotated

import typer

from mea.names import (
    BASELINES,
    CACHE_BITS,
    CODED_METHODS,
    DEFAULT_CODED_KEEP,
    DEFAULT_KEEP,
    DTYPES,
    TEXTS,
    WHOLE_HEAD_METHODS,
    listed,
)

WHAT, BUDGET, METHOD, CALIBRATION = "What", "Budget", "Method", "Calibration"
MEASUREMENT, TRAINING, ADVANCED = "Measurement", "Training", "Advanced"

# Defaults of mea.compression.Calibration, repeated because importing it takes seconds; a test compares them.
CALIBRATION_TEXT, CALIBRATION_TOKENS, CALIBRATION_WINDOW, COPY_FRACTION = "calibration", 16384, 1024, 0.5
WINDOW = 1024

TEXT_HELP = f"{listed(TEXTS)}, a .txt file, or a .jsonl file of chats (messages); also as .gz."
WHOLE_HEADS_HELP = f"Whole heads: {listed(WHOLE_HEAD_METHODS)}."
METHOD_HELP = f"Coding: {listed(CODED_METHODS)}. {WHOLE_HEADS_HELP}"
BASELINES_HELP = f"Baselines: {listed(BASELINES)}, or post_rope:WEIGHTING."
RANKED_HELP = f"{WHOLE_HEADS_HELP} {BASELINES_HELP}"


def fraction(text: object) -> float:
    """``0.2``, also written ``20%``."""
    given = str(text)
    try:
        return float(given.removesuffix("%")) / (100 if given.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is no fraction such as 0.2 or 20%") from None


KEEP_HELP = (
    f"Fraction of the cache's bytes to keep; {DEFAULT_CODED_KEEP:g} by default, {DEFAULT_KEEP:g} with whole heads."
)

Model = Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.", show_default=False)]
Against = Annotated[str | None, typer.Option(help="Model to compare with, in the same dtype.", rich_help_panel=WHAT)]
Text = Annotated[str, typer.Option(help=f"Text to score: {TEXT_HELP}", rich_help_panel=MEASUREMENT)]
Window = Annotated[
    int, typer.Option(help="Tokens of one window of the text; windows do not overlap.", rich_help_panel=MEASUREMENT)
]
CacheBits = Annotated[
    int | None,
    typer.Option(
        help=f"Quantise the cache of an uncompressed model to {listed(CACHE_BITS)} bits per number.",
        rich_help_panel=ADVANCED,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"{listed(DTYPES)}; auto is the dtype of the weights, fast is bfloat16 if the machine has fast bfloat16 "
        "products, else float32.",
        rich_help_panel=ADVANCED,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (the first GPU, or the CPU if there is none), cpu, cuda or cuda:NUMBER.",
        rich_help_panel=ADVANCED,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the random choices.", rich_help_panel=ADVANCED)]
CalibrationText = Annotated[
    str, typer.Option(help=f"Text to fit the factors on: {TEXT_HELP}", rich_help_panel=CALIBRATION)
]
CalibrationTokens = Annotated[int, typer.Option(help="Tokens of the calibration text.", rich_help_panel=CALIBRATION)]
CalibrationWindow = Annotated[
    int, typer.Option(help="Tokens of one window of the calibration text.", rich_help_panel=CALIBRATION)
]
CopyFraction = Annotated[
    float,
    typer.Option(
        help="Fraction of the windows with repeated spans, which preserve recall of earlier tokens.",
        rich_help_panel=CALIBRATION,
    ),
]
