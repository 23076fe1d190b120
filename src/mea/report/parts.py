"""The parts of a report, before they become HTML, Markdown, CSV or terminal text."""

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
        Text below the table that explains the numbers.
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
        Pairs of a model's name and its text; the first is what the others are compared with.
    """

    heading: str = ""
    text: str = ""
    numbers: list[tuple[str, str]] = field(default_factory=list)
    table: Table | None = None
    figures: list[Figure] = field(default_factory=list)
    quotes: list[tuple[str, str]] = field(default_factory=list)

    def differing(self) -> list[tuple[str, str, str, str]]:
        """Each quote as name, what it shares with the first one, the first other word, and the rest."""
        split = []
        for name, said in self.quotes:
            first, words = self.quotes[0][1].split(), said.split()
            same = next((i for i, word in enumerate(words) if first[i : i + 1] != [word]), len(words))
            split.append((name, " ".join(words[:same]), " ".join(words[same : same + 1]), " ".join(words[same + 1 :])))
        return split


@dataclass(frozen=True)
class Section:
    """All parts about one question."""

    heading: str
    parts: list[Part]
