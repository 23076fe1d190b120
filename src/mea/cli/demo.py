"""``mea demo``."""

import resource
import sys
from pathlib import Path
from typing import Annotated

import typer

from mea.cli import options as shared
from mea.cli.console import errors, output, progress

EXAMPLES = (
    "mea demo",
    "mea demo --out build/demo-refined --refined",
)
NEXT = (
    "mea compress MODEL OUT --keep 0.2",
    "mea perplexity OUT --against MODEL --text FILE",
    "mea generate OUT --prompt TEXT",
)


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the records and the report.", rich_help_panel=shared.WHAT)
    ] = Path("build/demo"),
    model: Annotated[
        str | None,
        typer.Option(help="A model instead of the packaged SmolLM2-135M.", rich_help_panel=shared.WHAT),
    ] = None,
    refined: Annotated[
        bool,
        typer.Option(
            "--refined",
            help="Also measure the default method with --refine 2, which takes longer.",
            rich_help_panel=shared.METHOD,
        ),
    ] = False,
) -> None:
    """Compress a small model's cache in four ways, and report quality, bytes and speed."""
    from mea.comparison.configs import DEMO, REFINED
    from mea.comparison.protocol import DEMO_PROTOCOL
    from mea.comparison.run import compare, describe_cost
    from mea.models.loading import packaged_model
    from mea.report import terminal_table, write_report

    source = model or packaged_model()
    configs = [*([REFINED] if refined else []), *DEMO]
    errors.print(describe_cost(source, configs, DEMO_PROTOCOL), highlight=False)
    with progress() as report:
        records = compare(source, out / "records", configs, protocol=DEMO_PROTOCOL, progress=report)
    page = write_report(records, out / "report.html")
    output.print(terminal_table(records))
    output.print(f"The same prompt, continued: {DEMO_PROTOCOL.prompt} ...", soft_wrap=True)
    for record in records:
        if said := record["results"].get("continuation"):
            output.print(f"  {record['config']['label']}: {' '.join(said['text'].split())}", soft_wrap=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    output.print(f"Peak memory of this process: {peak / 2**30:.1f} GiB")
    output.print(f"The report, with figures: {page}", soft_wrap=True)
    output.print("Next, with a model of your own:", *NEXT, sep="\n  ", soft_wrap=True)
