"""``mea compare``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models, check_text
from mea.cli import options as shared
from mea.cli.console import errors, output, progress
from mea.names import CACHE_BITS, CODED_KEEPS, CODED_METHODS, RANKED_KEEPS, listed

EXAMPLES = (
    "mea compare MODEL OUT --method predictive --keep 0.2 --keep 0.1",
    "mea compare MODEL OUT --method joint --method svd --bits 4 --tokens 2048",
)
METHODS, TEXTS = (*CODED_METHODS, "post_rope", "shared", "svd"), ("wikitext-2-test", "technical")
PEERS = "Other packages"
BITS = tuple(sorted(CACHE_BITS, reverse=True))


# As long as its list of options is.
def compare(
    model: shared.Model,
    out: Annotated[Path, typer.Argument(help="Folder for records and report; an interrupted run continues there.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{shared.METHOD_HELP} {shared.BASELINES_HELP} May be repeated; {', '.join(METHODS)} by default.",
            rich_help_panel=shared.WHAT,
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            parser=shared.fraction,
            metavar="<float>",
            help="Fraction of the cache's bytes to keep. May be repeated; by default "
            f"{', '.join(map(str, CODED_KEEPS))}, and {RANKED_KEEPS[0]} with methods that lower ranks.",
            rich_help_panel=shared.WHAT,
        ),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            help=f"Bits of the uncompressed model's quantised cache: {listed(BITS)}. May be repeated; all by default.",
            rich_help_panel=shared.WHAT,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Text to score. May be repeated; {' and '.join(TEXTS)} by default.",
            rich_help_panel=shared.MEASUREMENT,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.", rich_help_panel=shared.MEASUREMENT)] = 8192,
    window: shared.Window = shared.WINDOW,
    context: Annotated[
        int,
        typer.Option(
            help="Tokens of a window that are read before scoring starts.", rich_help_panel=shared.MEASUREMENT
        ),
    ] = 768,
    decode_steps: Annotated[
        int, typer.Option(help="Decoding steps that are timed; 0: none.", rich_help_panel=shared.MEASUREMENT)
    ] = 24,
    calibration_tokens: shared.CalibrationTokens = shared.CALIBRATION_TOKENS,
    calibration_window: shared.CalibrationWindow = shared.CALIBRATION_WINDOW,
    copy_fraction: shared.CopyFraction = shared.COPY_FRACTION,
    recover_tokens: Annotated[
        int,
        typer.Option(
            help="Measure every method also after training on this many tokens.", rich_help_panel=shared.TRAINING
        ),
    ] = 0,
    recover_text: Annotated[
        list[str] | None,
        typer.Option(help="Text to train on: a .txt file. May be repeated.", rich_help_panel=shared.TRAINING),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Backend of transformers' QuantizedCache: hqq, quanto. May be repeated.", rich_help_panel=PEERS
        ),
    ] = None,
    press: Annotated[
        list[str] | None, typer.Option(help="Press of kvpress, by class name. May be repeated.", rich_help_panel=PEERS)
    ] = None,
    kvpress: Annotated[
        str | None, typer.Option(help="Python executable of an environment with kvpress.", rich_help_panel=PEERS)
    ] = None,
    conversion: Annotated[
        list[str] | None,
        typer.Option(help="Conversion of cacheshrink: separate, joint, xkv. May be repeated.", rich_help_panel=PEERS),
    ] = None,
    cacheshrink: Annotated[
        str | None, typer.Option(help="Python executable of an environment with cacheshrink.", rich_help_panel=PEERS)
    ] = None,
    dtype: shared.Dtype = "fast",
    device: shared.Device = "auto",
) -> None:
    """Compare ways to make a model's cache smaller at measured bytes, with one protocol."""
    check_models(model)
    for source in text or ():
        check_text(source)
    if recover_tokens and not recover_text:
        raise ValueError("no text to train on: give at least one (--recover-text FILE)")
    from mea.comparison.configs import method_configs
    from mea.comparison.protocol import Protocol
    from mea.comparison.run import compare as run
    from mea.comparison.run import describe_cost, possible
    from mea.comparison.training import one_by_one, same_recovery
    from mea.compression import Calibration
    from mea.ops.device import use_device
    from mea.report import terminal_table, write_report
    from mea.report.registry import make_sections
    from mea.report.render.markdown import as_csv, write_markdown, write_text

    use_device(device)
    configs = method_configs(
        method or METHODS, keep or (), bits=bits or BITS, backends=backend or [],
        presses=press or [], conversions=conversion or [], recovered=recover_tokens > 0,
    )  # fmt: skip
    texts = tuple((name, tokens) for name in text or TEXTS)
    protocol = Protocol(texts, window, positions=(), prompt="", decode_steps=decode_steps, context=context, dtype=dtype)
    peers = {name: python for name, python in (("kvpress", kvpress), ("cacheshrink", cacheshrink)) if python}
    calibration = Calibration(tokens=calibration_tokens, window=calibration_window, copy_fraction=copy_fraction)
    if not (method and keep):  # the model may be too small for some of the defaults
        configs, reasons = possible(model, configs, calibration, protocol)
        for label, reason in reasons.items():
            errors.print(f"left out: {label} ({reason})", highlight=False)
    words = describe_cost(model, configs, protocol, calibration, recover_tokens)
    errors.print(words, highlight=False)
    with progress() as report:
        training = None
        if recover_tokens:
            width, held_out = min(512, window), min(8192, max(window, recover_tokens // 8))
            settings = one_by_one(tokens=recover_tokens, window=width, held_out=held_out)
            training = same_recovery(model, recover_text or [], settings, out / "recovery", report)
        records = run(
            model,
            out / "records",
            configs,
            protocol=protocol,
            peers=peers,
            training=training,
            progress=report,
            calibration=calibration,
        )
    sections = make_sections(records)
    write_markdown(sections, out / "report.md")
    write_text(out / "report.csv", as_csv(sections))
    page = write_report(records, out / "report.html", regenerate="mea compare", sections=sections)
    output.print(terminal_table(records))
    output.print(f"The report, with figures: {page}", soft_wrap=True)
