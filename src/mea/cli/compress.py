"""``mea compress``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mea.arguments import check_budget, check_models, check_output, check_text, unfinished
from mea.cli import options as shared
from mea.cli.console import SPEAKS, errors, output, progress
from mea.names import (
    BASELINES,
    CODED_METHODS,
    DEFAULT_METHOD,
    LAYOUTS,
    METHODS,
    WHOLE_HEAD_METHODS,
    did_you_mean,
    listed,
    size,
)

EXAMPLES = (
    "mea compress MODEL OUT --keep 0.2",
    "mea compress MODEL OUT --budget '64k tokens in 2 GiB' --method joint",
)


# As long as its list of options is.
def compress(
    model: shared.Model,
    out: Annotated[Path, typer.Argument(help="Folder for the result; must not exist, or be empty.")],
    keep: Annotated[
        float | None,
        typer.Option(parser=shared.fraction, metavar="<float>", help=shared.KEEP_HELP, rich_help_panel=shared.BUDGET),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Instead of --keep: bytes at a context length, '64k tokens in 2 GiB'.", rich_help_panel=shared.BUDGET
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help=f"Compressed layers: {listed(LAYOUTS)}; or a JSON file with \\[r_k, r_v] or null per layer.",
            rich_help_panel=shared.BUDGET,
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=shared.METHOD_HELP, rich_help_panel=shared.METHOD)] = DEFAULT_METHOD,
    refine: Annotated[
        int,
        typer.Option(help="Passes of refinement over the calibration text; 0: none.", rich_help_panel=shared.METHOD),
    ] = 0,
    calibration_text: shared.CalibrationText = shared.CALIBRATION_TEXT,
    calibration_tokens: shared.CalibrationTokens = shared.CALIBRATION_TOKENS,
    calibration_window: shared.CalibrationWindow = shared.CALIBRATION_WINDOW,
    copy_fraction: shared.CopyFraction = shared.COPY_FRACTION,
    groups: Annotated[
        int,
        typer.Option(
            help="With whole heads: groups of neighbouring heads with separate latents, for tensor parallelism.",
            rich_help_panel=shared.ADVANCED,
        ),
    ] = 1,
    measure: Annotated[
        int,
        typer.Option(
            help="WikiText-2 test tokens for the model card's perplexity; 0: none.", rich_help_panel=shared.ADVANCED
        ),
    ] = 4096,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    seed: shared.Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, its memory and its time.")] = False,
) -> None:
    """Compress a model's KV cache, check the result, and save it as an ordinary model."""
    baseline = method.partition(":")[0] in BASELINES
    if baseline or method not in METHODS:
        what = "a baseline, which mea compare measures" if baseline else "no method"
        raise ValueError(
            f"{method} is {what}: give {listed(CODED_METHODS)}, which lose least at equal bytes, or a whole-head "
            f"method ({listed(WHOLE_HEAD_METHODS)}){'' if baseline else did_you_mean(method, METHODS)}"
        )
    check_budget(keep, budget, layout)
    check_models(model)
    check_text(calibration_text)
    if not dry_run:
        check_output(out)
    from mea.compression import Calibration, CompressOptions, compress_to_folder, preview
    from mea.ops.device import use_device
    from mea.report.sections.compression import compression_table, plan_table

    use_device(device)
    calibration = Calibration(calibration_text, calibration_tokens, calibration_window, seed, copy_fraction)
    options = CompressOptions(
        keep, budget, layout, method, groups, calibration, refine,
    )  # fmt: skip
    plan = preview(model, options, dtype=dtype)
    if dry_run:
        output.print(plan_table(plan))
        return
    if SPEAKS:
        errors.print(summary(plan, keep), highlight=False, soft_wrap=not errors.is_terminal)
        if (kept := unfinished(out)).is_dir():
            errors.print(
                f"{kept} holds an interrupted run: the same settings continue there, in less time", soft_wrap=True
            )
    with progress() as report:
        record = compress_to_folder(model, out, options, dtype=dtype, measure_tokens=measure, progress=report)
    output.print(compression_table(record, str(out)))


def summary(plan: dict[str, Any], keep: float | None) -> str:
    """The plan of a compression that was to `keep` a fraction, in one line, from `mea.compression.preview`."""
    before, after = plan["bytes_per_token_before"], plan["bytes_per_token"]
    unit = "16-bit cache" if "tiers" in plan else "cache"
    most = ", the most of a packed cache" if "tiers" in plan and after / before < (keep or 0) - 0.01 else ""
    return (
        f"{plan['method']}: keep {after / before:.0%} of the {unit}{most}, {before:,} -> {after:,} bytes per token; "
        f"calibrate on {plan['calibration_tokens']:,} tokens, in about "
        f"{plan['seconds'] / 60:,.1f} min on this machine, before checks and measurement; "
        f"result of about {size(plan['result_bytes'])} ({plan['dtype']})"
    )
