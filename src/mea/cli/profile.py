"""``mea profile``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import errors, progress


def profile(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Record to write, a .json file; an unfinished one is gone on with.")],
    keep: Annotated[float, typer.Option(help="Fraction of its cache's bytes that each layer keeps in its turn.")] = 0.5,
    method: Annotated[str, typer.Option(help="As in mea compress.")] = "post_rope",
    text: Annotated[
        str | None, typer.Option(help="Held-out text; by default what calibration leaves of its text.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens per held-out window.")] = 1024,
    dtype: Annotated[str, typer.Option(help="fast (bfloat16 where it is), auto, float32 or bfloat16.")] = "fast",
    calibration_text: Annotated[str, typer.Option(help="A packaged text or a .txt file.")] = "calibration",
    calibration_tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    calibration_window: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 1024,
    copy_fraction: Annotated[float, typer.Option(help="As in mea compress.")] = 0.5,
) -> None:
    """Compress one layer at a time and show what each costs: which layers can spare their cache."""
    from mea.compression import Calibration, CompressOptions
    from mea.compression.allocate.profile import describe_cost
    from mea.compression.allocate.profile import profile as run
    from mea.report.sections.profile import profile_table

    calibration = Calibration(calibration_text, calibration_tokens, calibration_window, copy_fraction=copy_fraction)
    errors.print(describe_cost(model, tokens, window), highlight=False)
    with progress() as report:
        record = run(
            model, out, CompressOptions(keep=keep, method=method, calibration=calibration),
            text=text, tokens=tokens, window=window, dtype=dtype, progress=report,
        )  # fmt: skip
    Console().print(profile_table(record))
    Console().print(f"mea report {out} --out profile.html draws it.", soft_wrap=True, highlight=False)
