"""``mea report``."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from mea.cli import options as shared
from mea.cli.console import errors, output

EXAMPLES = (
    "mea report RECORDS --out report.html",
    "mea report RECORDS fit.json --markdown README.md --csv tables.csv",
)


def report(
    records: Annotated[list[Path], typer.Argument(help="Records, or folders that are searched recursively.")],
    out: Annotated[Path | None, typer.Option(help="HTML page to write.", rich_help_panel=shared.WHAT)] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown file to write, or to update.", rich_help_panel=shared.WHAT)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file of all tables.", rich_help_panel=shared.WHAT)] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.", rich_help_panel=shared.WHAT)] = "",
) -> None:
    """Write one page from what other commands measured: their records, or the models that they wrote."""
    from mea.report import as_csv, find_records, make_sections, write_markdown, write_report, write_text
    from mea.report.registry import not_shown
    from mea.report.render.html import check_packages

    if out is None and markdown is None and csv is None:
        raise ValueError("nothing to write: give --out, --markdown or --csv")
    check_packages()
    say = functools.partial(errors.print, soft_wrap=True, highlight=False)
    loaded = find_records(records, lambda message: say(f"left out: {message}"))
    sections = make_sections(loaded)
    for kind, count in not_shown(loaded).items():
        say(f"no section shows records of the kind {kind}: {count} left out")
    written = []
    if out:
        command = " ".join(["mea report", *map(_shown, records), "--out", _shown(out)])
        written.append(write_report(loaded, out, title=title, regenerate=command, sections=sections))
    if markdown:
        written.append(write_markdown(sections, markdown))
    if csv:
        written.append(write_text(csv, as_csv(sections)))
    for path in written:
        output.print(path, soft_wrap=True, highlight=False)


def _shown(path: Path) -> str:
    """A path without local folders: the last part of an absolute path."""
    return path.name if path.is_absolute() else str(path)
