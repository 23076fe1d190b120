"""One HTML page that shows records: no script, nothing loaded from elsewhere, readable on paper and on a phone."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from mea.names import printable
from mea.records import Record
from mea.report.parts import Section
from mea.report.registry import make_sections, not_shown
from mea.report.render.markdown import write_text

LONG = 5  # headings of a page that gets a list of contents


def write_report(
    records: Sequence[Record],
    path: str | Path,
    *,
    title: str = "",
    regenerate: str = "make demo",
    sections: Sequence[Section] | None = None,
) -> Path:
    """Write the page of some records.

    Parameters
    ----------
    records
        As `mea.records.read_records` or `mea.report.find_records` gives them.
    path
        The HTML file to write.
    title
        Heading; by default that of the only section, or "Report".
    regenerate
        The command that makes the page again.
    sections
        From `make_sections`, if they were made already.

    Raises
    ------
    ValueError
        No record is of a kind that has a section.
    ImportError
        matplotlib or jinja2 is not installed.
    """
    return write_text(path, render(records, title=title, regenerate=regenerate, sections=sections))


def render(
    records: Sequence[Record],
    *,
    title: str = "",
    regenerate: str = "make demo",
    sections: Sequence[Section] | None = None,
) -> str:
    """The page as text; see `write_report`."""
    check_packages()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    sections = make_sections(records) if sections is None else sections
    environment = Environment(
        loader=PackageLoader("mea.report.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    only = sections[0].heading if len(sections) == 1 else ""
    page = environment.get_template("page.html").render(
        title=title or only or "Report",
        sections=sections,
        headed=len(sections) > 1 or bool(title),
        machines=_distinct(_machine(record) for record in records),
        versions=_distinct(record["versions"] for record in records),
        kinds=_kinds(records),
        left_out=", ".join(f"{count} of the kind {kind}" for kind, count in not_shown(records).items()),
        regenerate=regenerate,
        contents=len(sections) > 1 or sum(bool(part.heading) for part in sections[0].parts) >= LONG,
    )
    return printable(page)


def check_packages() -> None:
    """Check that the packages of the report are installed.

    Raises
    ------
    ImportError
        One is missing; the message says how to install it.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the report needs {' and '.join(missing)}: pip install 'mea[report]'")


def _kinds(records: Sequence[Record]) -> str:
    """Kinds of records with their number, dates and commits: ``36 pretraining (2026-11-29, commit 0123456789ab)``."""
    lines = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        chosen = [record for record in records if record["kind"] == kind]
        commits = sorted({(record["commit"] or "unknown")[:12] for record in chosen})
        dates = sorted(record["date"][:10] for record in chosen)
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines.append(f"{len(chosen)} {kind} ({span}, commit{'s' * (len(commits) > 1)} {', '.join(commits)})")
    return "; ".join(lines)


def _machine(record: Record) -> dict[str, str]:
    machine = record["machine"]
    memory = machine.get("memory_bytes")
    shown = {
        "processor": machine.get("processor"),
        "architecture": machine.get("architecture"),
        "system": machine.get("system"),
        "cores": machine.get("cores"),
        "memory": f"{memory / 2**30:.0f} GiB" if isinstance(memory, int) else None,
        "accelerator": machine.get("accelerator") or "none",
    }
    return {name: str(value) for name, value in shown.items() if value is not None}


def _distinct(items: Iterable[dict[str, str]]) -> list[str]:
    texts = (", ".join(f"{name} {value}" for name, value in item.items()) for item in items)
    return list(dict.fromkeys(texts))
