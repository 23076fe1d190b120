"""Sections as Markdown between two marks of a file, with figures beside it, and as CSV."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from mea.names import escaped, printable
from mea.records import write_atomically
from mea.report.parts import Part, Section, Table
from mea.report.render.svg import standalone

START = "<!-- begin: written by mea report from records; edit outside of these marks -->"
END = "<!-- end: written by mea report -->"
FIGURES = "figures"  # folder beside the Markdown
LONGEST_NAME = 100  # letters of a figure's file name, which may have 255 bytes
NUMBER = r"[+-]?\d[\d,]*(\.\d+)?(e-?\d+)?"
PLAIN_NUMBER = re.compile(rf"{NUMBER}( ± {NUMBER}| %)?( \({NUMBER} to {NUMBER}\)| to {NUMBER})?")


def write_text(path: str | Path, text: str) -> Path:
    """Write a file atomically; its folder is created if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, text)


def write_markdown(sections: Sequence[Section], path: str | Path) -> Path:
    """Write sections between the marks of a Markdown file, and their figures into a folder beside it.

    Creates a missing file; in an existing one only the text between the marks is replaced. Removes figures that this
    function wrote earlier and that are no longer used, and nothing else.

    Raises
    ------
    ValueError
        The file exists and has not exactly one pair of marks.
    """
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.exists() else f"{START}\n{END}\n"
    if old.count(START) != 1 or old.count(END) != 1 or old.index(START) > old.index(END):
        raise ValueError(
            f"{path} must contain these two lines exactly once, around the place of the report: {START} {END}"
        )
    before, rest = old.split(START)
    between, after = rest.split(END)
    figures = {
        _file_name(figure.name): standalone(figure.svg)
        for section in sections
        for part in section.parts
        for figure in part.figures
    }
    folder = path.parent / FIGURES
    for name, text in figures.items():
        write_text(folder / name, text)
    for name in _figures_of(between) - set(figures):
        (folder / name).unlink(missing_ok=True)
    return write_text(path, f"{before}{START}\n\n{markdown(sections)}\n{END}{after}")


def markdown(sections: Sequence[Section]) -> str:
    """Sections as Markdown that names figures as files of `FIGURES`."""
    return "\n".join(block for section in sections for block in _section(section))


def as_csv(sections: Sequence[Section]) -> str:
    """All tables as one: section, table, row (its texts), column, value; a line for every cell.

    An apostrophe stands before a cell that a spreadsheet would take for a formula.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["section", "table", "row", "column", "value"])
    tables = [(section, part, part.table) for section in sections for part in section.parts if part.table]
    for section, part, table in tables:
        for line in table.lines:
            row = " / ".join(line[: table.texts])
            for column, value in list(zip(table.header, line, strict=True))[table.texts :]:
                cells = (section.heading, part.heading, row, " ".join(column.split()), value)
                writer.writerow(map(_csv_cell, cells))
    return text.getvalue()


def table_markdown(table: Table) -> str:
    """One table, without its note."""
    rules = ["---" if index < table.texts else "---:" for index in range(len(table.header))]
    lines = [[_cell(title) for title in table.header], rules]
    for index, line in enumerate(table.lines):
        lines.append([f"**{cell}**" if cell and index in table.best else cell for cell in map(_cell, line)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _section(section: Section) -> list[str]:
    blocks = [f"## {_line(section.heading)}\n"]
    for part in section.parts:
        blocks += _part(part)
    return blocks


def _part(part: Part) -> list[str]:
    blocks = [f"### {_line(part.heading)}\n"] if part.heading else []
    numbers = "".join(f"- **{_line(number)}** {_line(meaning)}\n" for number, meaning in part.numbers)
    blocks += [numbers] if numbers else []
    blocks += [_line(part.text) + "\n"] if part.text else []
    if part.table:
        blocks += [table_markdown(part.table)] + ([_line(part.table.note) + "\n"] if part.table.note else [])
    for figure in part.figures:
        caption = _line(figure.caption)
        alternative = caption.replace("[", "(").replace("]", ")")
        blocks += [f"![{alternative}]({FIGURES}/{_file_name(figure.name)})\n\n{caption}\n"]
    for name, said in part.quotes:
        blocks += [f"**{_line(name)}**\n\n" + "".join(f"> {escaped(line)}\n" for line in said.splitlines())]
    return blocks


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return escaped(" ".join(text.split()))


def _csv_cell(text: str) -> str:
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) and not PLAIN_NUMBER.fullmatch(text) else text


def _file_name(name: str) -> str:
    """The file of a figure: letters, digits and ``-_.`` only, so that it is in no other folder."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name.lower())
    return f"{name if len(name.encode()) <= LONGEST_NAME else f'{name[:20]}-{crc32(name.encode()):08x}'}.svg"


def _figures_of(text: str) -> set[str]:
    """Files of the figure folder that Markdown written here refers to."""
    names = re.findall(rf"\]\({FIGURES}/([\w.-]+)\.svg\)", text)
    return {f"{name}.svg" for name in names if _file_name(name) == f"{name}.svg"}
