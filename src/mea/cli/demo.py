"""``mea demo``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import progress


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the records and the report.")] = Path("build/demo"),
    model: Annotated[str | None, typer.Option(help="Another model than SmolLM2-135M from its package.")] = None,
    refined: Annotated[bool, typer.Option("--refined", help="Also the default method with --refine 2: slow.")] = False,
) -> None:
    """Compress a real model to half of its cache with every method, and report what that costs and brings."""
    from mea.comparison.configs import DEMO, REFINED
    from mea.comparison.run import compare, describe_cost
    from mea.models.loading import packaged_model
    from mea.report import terminal_table, write_report

    source = model or packaged_model()
    configs = [*([REFINED] if refined else []), *DEMO]
    Console(stderr=True).print(describe_cost(source, configs), highlight=False)
    with progress() as report:
        records = compare(source, out / "records", configs, progress=report)
    page = write_report(records, out / "report.html")
    Console().print(terminal_table(records))
    Console().print(f"The report, with figures: {page}", soft_wrap=True)
