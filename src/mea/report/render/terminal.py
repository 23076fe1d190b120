"""A table for a terminal: at most as wide as the terminal, with whole words and whole labels."""

import re
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable
from rich.text import Text

from mea.names import printable
from mea.report.parts import Part

BREAK = r"(?<=\w{9}_)(?=[^_\s])|(?<=[^\W\d_]{5}-)(?=\w)"  # in a long name, after an underscore or a hyphen
TEXT_BREAKS, NUMBER_BREAKS = re.compile(rf"(\s+)|{BREAK}"), re.compile(rf"(\n)|{BREAK}")  # "1.5 ± 0.1" is one piece
NARROWEST = 8  # columns of text that share a terminal with a word that is too long for it


class TerminalTable:
    """The heading, table and note of a part, as something that rich prints.

    Text is wrapped between words, and inside a long name after an underscore or a hyphen. An interval stands below its
    value. Columns of numbers that do not fit beside the others follow in a second table, which repeats the labels.

    Raises
    ------
    ValueError
        The part has no table.
    """

    def __init__(self, part: Part) -> None:
        if part.table is None:
            raise ValueError(f"{part.heading or 'this part'} has no table")
        self.part, self.table = part, part.table
        rows = [list(map(printable, row)) for row in (part.table.header, *part.table.lines)]
        self.columns = [[_pieces(cell, n == 0 or i < part.table.texts) for n, cell in enumerate(column)]
                        for i, column in enumerate(zip(*rows, strict=True))]  # fmt: skip

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable | Text | str]:
        if self.part.heading:
            yield Text(printable(self.part.heading), "bold")
        layouts = (self._layout(options.max_width, gap) for gap in (2, 1))
        for block in min(layouts, key=len):
            yield block
            yield ""
        if self.table.note:
            yield Text(printable(self.table.note), "dim")
            yield ""

    def _layout(self, width: int, gap: int) -> list[RichTable]:
        """One table, or several where the columns need more than the width."""
        labels, numbers = range(self.table.texts), range(self.table.texts, len(self.columns))
        least = [max(cell_len(piece) for cell in column for piece in cell) for column in self.columns]
        room = width + gap - max((least[index] + gap for index in numbers), default=0)
        if sum(least[index] + gap for index in labels) > room:  # a word that has to be folded
            share = max(NARROWEST, room // len(labels) - gap)
            least = [min(value, share) if index in labels else value for index, value in enumerate(least)]
        room = width + gap - sum(least[index] + gap for index in labels)
        blocks: list[list[int]] = [[]]
        for index in numbers:
            if blocks[-1] and sum(least[i] + gap for i in [*blocks[-1], index]) > room:
                blocks.append([])
            blocks[-1].append(index)
        return [self._block([*labels, *block], least, width, gap) for block in blocks]

    def _block(self, shown: list[int], least: list[int], width: int, gap: int) -> RichTable:
        widths = {index: least[index] for index in shown}
        spare = width - sum(widths.values()) - gap * (len(shown) - 1)
        wanted = {index: max(map(_width, self.columns[index])) - least[index] for index in shown}
        for count, index in enumerate(sorted(wanted, key=lambda i: wanted[i])):  # first those that need least
            share = max(0, min(wanted[index], spare // (len(wanted) - count)))
            widths[index] += share
            spare -= share
        headed = any(self.table.header)
        printed = RichTable(box=SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False, show_edge=False)
        printed.padding = (0, gap - headed, 0, 0)  # the box has one space between columns
        for index in shown:
            justify = "right" if index >= self.table.texts else "left"
            title = Text(_wrapped(self.columns[index][0], widths[index]))
            printed.add_column(title, justify=justify, width=widths[index], overflow="fold", vertical="top")
        for row in range(len(self.table.lines)):
            cells = (Text(_wrapped(self.columns[index][row + 1], widths[index])) for index in shown)
            printed.add_row(*cells, style="bold" if row in self.table.best else "")
        return printed


def _pieces(cell: str, text: bool) -> list[str]:
    """What is never broken, with what separates it; of a number its interval stands on a line below."""
    if not text:
        cell = re.sub(r" (at \S+|\(.+\))$", r"\n\1", re.sub(r" \((\S+) to (\S+)\)", r"\n\1…\2", cell))
    return [piece for piece in (TEXT_BREAKS if text else NUMBER_BREAKS).split(cell) if piece] or [""]


def _width(pieces: list[str]) -> int:
    return max(map(cell_len, "".join(pieces).split("\n")))


def _wrapped(pieces: list[str], width: int) -> str:
    """Lines of at most this width, as far as no piece is wider."""
    lines = [""]
    for piece in pieces:
        if "\n" in piece:
            lines.append("")
        elif piece.isspace() or cell_len(lines[-1] + piece) <= width:
            lines[-1] += piece
        else:
            lines.append(piece)
    return "\n".join(line.strip() for line in lines)
