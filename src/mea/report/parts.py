"""What a report is made of, before it becomes a page, Markdown, CSV or lines in a terminal."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes
    ----------
    header, lines
        Titles of the columns, and one list of as many cells per row; the first `texts` columns are text, the others
        are numbers, aligned to the right.
    note
        What the numbers mean.
    best
        Indices of the rows to highlight.
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
    """What stands under one heading: headline numbers, text, a table, figures, quoted texts; each may be missing.

    Attributes
    ----------
    numbers
        Pairs of a number and its meaning.
    quotes
        Pairs of a model's name and its text.
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
