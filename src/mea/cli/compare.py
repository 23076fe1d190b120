"""``mea compare``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import progress


def compare(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder for records and report; a run is resumed there.")],
    method: Annotated[list[str] | None, typer.Option(help="As in mea compress; may be repeated.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Sizes; 0.25, 0.33, 0.5, 0.67 and 0.8 by default.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Of a quantised cache; 8, 4 and 2 by default.")] = None,
    allocate: Annotated[list[float] | None, typer.Option(help="Sizes to allocate layer by layer as well.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Of transformers' QuantizedCache: hqq, quanto.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="A class of kvpress; may be repeated.")] = None,
    kvpress: Annotated[str | None, typer.Option(help="Python of an environment that has kvpress.")] = None,
    conversion: Annotated[list[str] | None, typer.Option(help="Of cacheshrink: separate, joint, xkv.")] = None,
    cacheshrink: Annotated[str | None, typer.Option(help="Python of an environment that has cacheshrink.")] = None,
    recover_tokens: Annotated[int, typer.Option(help="Measure every method also after training on so many.")] = 0,
    recover_text: Annotated[list[str] | None, typer.Option(help="To train on: a .txt file; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="To score; wikitext-2-test and technical by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    context: Annotated[int, typer.Option(help="Of these, read before the continuation that is scored.")] = 768,
    dtype: Annotated[str, typer.Option(help="To score in: fast (bfloat16 where it is), float32, bfloat16.")] = "fast",
    calibration_tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    calibration_window: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 1024,
    copy_fraction: Annotated[float, typer.Option(help="As in mea compress.")] = 0.5,
    decode_steps: Annotated[int, typer.Option(help="Decoding steps that are timed; 0: none.")] = 24,
) -> None:
    """Compare every way to make a model's cache smaller, by measured bytes, in one protocol."""
    from mea.comparison.configs import method_configs
    from mea.comparison.protocol import Protocol
    from mea.comparison.run import Training, describe_cost
    from mea.comparison.run import compare as run
    from mea.compression import Calibration
    from mea.compression.methods import DEFAULT_METHOD
    from mea.report import terminal_table, write_report
    from mea.report.registry import make_sections
    from mea.report.render.markdown import as_csv, write_markdown, write_text
    from mea.train.same_recovery import SameRecovery, one_by_one

    configs = method_configs(
        method or [DEFAULT_METHOD, "joint"], keep or [0.25, 0.33, 0.5, 0.67, 0.8], bits=bits or [8, 4, 2],
        backends=backend or [], allocated=allocate or [], presses=press or [],
        conversions=conversion or [], recovered=recover_tokens > 0,
    )  # fmt: skip
    texts = tuple((name, tokens) for name in text or ("wikitext-2-test", "technical"))
    protocol = Protocol(texts, window, positions=(), prompt="", decode_steps=decode_steps, context=context, dtype=dtype)
    peers = {name: python for name, python in (("kvpress", kvpress), ("cacheshrink", cacheshrink)) if python}
    calibration = Calibration(tokens=calibration_tokens, window=calibration_window, copy_fraction=copy_fraction)
    if recover_tokens and not recover_text:
        raise ValueError("no text to train on: give at least one (--recover-text FILE)")
    words = describe_cost(model, configs, protocol, calibration, recover_tokens)
    Console(stderr=True).print(words, highlight=False)
    with progress() as report:
        training = None
        if recover_tokens:
            width, held_out = min(512, window), min(8192, max(window, recover_tokens // 8))
            settings = one_by_one(tokens=recover_tokens, window=width, held_out=held_out)
            same = SameRecovery(model, recover_text or [], settings, out / "recovery", report)
            training = Training(same, same.description)
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
    Console().print(terminal_table(records))
    Console().print(f"The report, with figures: {page}", soft_wrap=True)
