"""``mea compress``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import progress


def compress(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the result; must not exist, or be empty.")],
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the cache's bytes that stays; 0.5 by default.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Instead: bytes at a context, '64k tokens in 2 GiB'.")] = None,
    layout: Annotated[str | None, typer.Option(help="Instead: full, half or deep, or a JSON file of ranks.")] = None,
    method: Annotated[
        str,
        typer.Option(help="post_rope, pre_rope, joint, gauge, gqa-procrustes, gqa-mean, gram or svd."),
    ] = "post_rope",
    weighting: Annotated[
        str | None, typer.Option(help="Of post_rope: mean (default), uniform, sensitivity or frequency.")
    ] = None,
    groups: Annotated[
        int, typer.Option(help="Groups of neighbouring heads with latents of their own, for tensor parallelism.")
    ] = 1,
    text: Annotated[str, typer.Option(help="Calibration text: a packaged name or a .txt file.")] = "calibration",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 1024,
    copy_fraction: Annotated[
        float, typer.Option(help="Share of the windows in which a part is read again, for facts far back to be found.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses the calibration windows.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the weights' own), fast, float32, bfloat16 or float16.")] = "auto",
    measure: Annotated[
        int, typer.Option(help="WikiText-2 test tokens for the model card's perplexity; 0: none.")
    ] = 4096,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Choose ranks layer by layer, by what they cost on held-out text.")
    ] = False,
    equal: Annotated[
        bool, typer.Option("--equal", help="With --allocate: as many numbers for keys as for values in each layer.")
    ] = False,
    same: Annotated[bool, typer.Option("--same", help="With --allocate: the same ranks in all layers.")] = False,
    step: Annotated[int | None, typer.Option(help="With --allocate: ranks are multiples of it.")] = None,
    refine: Annotated[
        int, typer.Option(help="Passes over the calibration text in which layers are refined; 0: none.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done and what it costs.")] = False,
) -> None:
    """Make a model cache half of its keys and values, check the result, and save it as an ordinary model."""
    from mea.compression import Allocation, Calibration, CompressOptions, compress_to_folder, preview
    from mea.report.sections.compression import compression_table, plan_table

    calibration = Calibration(text, tokens, window, seed, copy_fraction)
    if not allocate and (equal or same or step is not None):
        raise ValueError("--equal, --same and --step say how to allocate ranks: give --allocate too")
    options = CompressOptions(
        keep, budget, layout, method, weighting, groups, calibration,
        allocate=Allocation(equal=equal, same=same, step=step) if allocate else False, refine=refine,
    )  # fmt: skip
    Console(stderr=not dry_run).print(plan_table(preview(model, options, dtype=dtype)))
    if dry_run:
        return
    with progress() as report:
        record = compress_to_folder(model, out, options, dtype=dtype, measure_tokens=measure, progress=report)
    Console().print(compression_table(record, str(out)))
