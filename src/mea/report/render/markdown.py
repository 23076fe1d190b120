"""Sections as Markdown between two marks of a file, with figures beside it, and as CSV."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from mea.report.parts import Part, Section, Table
from mea.report.render.svg import standalone

START = "<!-- begin: written by mea report from records; edit outside of these marks -->"
END = "<!-- end: written by mea report -->"
FIGURES = "figures"  # folder beside the Markdown


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_markdown(sections: Sequence[Section], path: str | Path) -> Path:
    """Write sections between the marks of a Markdown file, and their figures into a folder beside it.

    A file that does not exist yet is made; of one that exists only what is between the marks is replaced. Figures that
    this function wrote earlier and that are no longer wanted are removed.

    Raises
    ------
    ValueError
        The file exists and has not exactly one pair of marks.
    """
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.exists() else f"{START}\n{END}\n"
    if old.count(START) != 1 or old.count(END) != 1 or old.index(START) > old.index(END):
        raise ValueError(
            f"{path} has no place for the report, or several: put these two lines where it is to go: {START} {END}"
        )
    before, rest = old.split(START)
    after = rest.split(END)[1]
    figures = {
        f"{_slug(figure.name)}.svg": standalone(figure.svg)
        for section in sections
        for part in section.parts
        for figure in part.figures
    }
    folder = path.parent / FIGURES
    for name, text in figures.items():
        write_text(folder / name, text)
    for name in _figures_of(rest.split(END)[0]) - set(figures):
        (folder / name).unlink(missing_ok=True)
    return write_text(path, f"{before}{START}\n\n{markdown(sections)}\n{END}{after}")


def markdown(sections: Sequence[Section]) -> str:
    """Sections as Markdown that names figures as files of `FIGURES`."""
    return "\n".join(block for section in sections for block in _section(section))


def as_csv(sections: Sequence[Section]) -> str:
    """All tables as one: section, table, row (its texts), column, value; a line for every cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["section", "table", "row", "column", "value"])
    for section in sections:
        for part in section.parts:
            if part.table is None:
                continue
            for line in part.table.lines:
                texts = part.table.texts
                row = " / ".join(line[:texts])
                for column, value in list(zip(part.table.header, line, strict=True))[texts:]:
                    writer.writerow([section.heading, part.heading, row, " ".join(column.split()), value])
    return text.getvalue()


def table_markdown(table: Table) -> str:
    """One table, without its note."""
    rules = ["---" if index < table.texts else "---:" for index in range(len(table.header))]
    lines = [[" ".join(title.split()) for title in table.header], rules]
    for index, line in enumerate(table.lines):
        lines.append([f"**{cell}**" if cell and index in table.best else cell for cell in map(_cell, line)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _section(section: Section) -> list[str]:
    blocks = [f"## {section.heading}\n"]
    for part in section.parts:
        blocks += _part(part)
    return blocks


def _part(part: Part) -> list[str]:
    blocks = [f"### {part.heading}\n"] if part.heading else []
    blocks += ["".join(f"- **{number}** {meaning}\n" for number, meaning in part.numbers)] if part.numbers else []
    blocks += [_plain(part.text) + "\n"] if part.text else []
    if part.table:
        blocks += [table_markdown(part.table)] + ([part.table.note + "\n"] if part.table.note else [])
    for figure in part.figures:
        caption = figure.caption.replace("[", "(").replace("]", ")")
        blocks += [f"![{caption}]({FIGURES}/{_slug(figure.name)}.svg)\n\n{figure.caption}\n"]
    for name, said in part.quotes:
        blocks += [f"**{name}**\n\n" + "".join(f"> {_plain(line)}\n" for line in said.splitlines())]
    return blocks


def _cell(text: str) -> str:
    return _plain(" ".join(text.split())).replace("|", "\\|").replace("*", "\\*")


def _plain(text: str) -> str:
    """Text that stays text: a model may have said anything, the marks of this module too."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name.lower())


def _figures_of(text: str) -> set[str]:
    """File names that Markdown written here refers to."""
    return {piece.split(")")[0] for piece in text.split(f"]({FIGURES}/")[1:]}
