"""What a report is made of, before it becomes a page, Markdown, CSV or lines in a terminal."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes
    ----------
    header, lines
        Titles of the columns, and one list of as many cells per row; the first `texts` columns are text, the others
        numbers, which stand to the right.
    note
        What the numbers mean.
    best
        Rows to point out.
    """

    header: list[str]
    lines: list[list[str]]
    note: str = ""
    best: tuple[int, ...] = ()
    texts: int = 1


@dataclass(frozen=True)
class Figure:
    """An ``<svg>`` element that takes its text colour from the page; `name` makes a file name."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Part:
    """Something under one heading: numbers to take away, text, a table, figures, quoted texts; whatever there is.

    Attributes
    ----------
    quotes
        Who said it, and what.
    """

    heading: str = ""
    text: str = ""
    numbers: list[tuple[str, str]] = field(default_factory=list)
    table: Table | None = None
    figures: list[Figure] = field(default_factory=list)
    quotes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """All parts about one question."""

    heading: str
    parts: list[Part]


def terminal(part: Part) -> Group:
    """The table of a part for a terminal.

    So that columns stay narrow intervals stand below their values, a rate below its variant, and long names are broken
    after an underscore.

    Raises
    ------
    ValueError
        The part has no table.
    """
    if part.table is None:
        raise ValueError(f"{part.heading or 'this part'} has no table")
    shown = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    lines = [[_narrow(cell, index < part.table.texts) for index, cell in enumerate(line)] for line in part.table.lines]
    for index, title in enumerate(part.table.header):
        number = index >= part.table.texts
        unbroken = [*title.split(), *(row for line in lines for row in line[index].split("\n"))]
        width = max(map(len, unbroken)) if number else None  # titles and names are wrapped, numbers never
        shown.add_column(Text(title), justify="right" if number else "left", width=width, overflow="fold")
    for index, line in enumerate(lines):
        shown.add_row(*map(Text, line), style="bold" if index in part.table.best else "")
    return Group(Text(part.heading, "bold"), shown, "", Text(part.table.note, "dim"), "")


def _narrow(cell: str, text: bool) -> str:
    cell = re.sub(r"(\w{9,}?_)(?=\w)", r"\1\n", cell)
    if text:
        return cell
    return re.sub(r" (at \S+|\(.+\))$", r"\n\1", re.sub(r" \((\S+) to (\S+)\)", r"\n\1…\2", cell))


def with_interval(
    value: float | int | None, interval: Sequence[float] | None, digits: int = 3, sign: str = "", unit: str = ""
) -> str:
    """``3.412 (3.401 to 3.423)``; without an interval only the value.

    Parameters
    ----------
    digits
        After the point; below 0: significant digits in scientific notation (``1.7e9``).
    sign
        ``"+"`` shows signs of positive values too.
    unit
        Behind the value.
    """
    if value is None:
        return ABSENT
    shown = [
        format(x, f"{sign},.{digits}f" if digits >= 0 else f"{sign}.{-digits - 1}e") for x in (value, *(interval or ()))
    ]
    shown = [re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", x) for x in shown]
    return shown[0] + unit + (f" ({shown[1]} to {shown[2]})" if interval else "")
