"""Long context: a fact hidden at every depth of texts of several lengths, and whether the model finds it.

Fields of a record of the kind `NEEDLE`: ``config.label`` or ``config.model``; ``results.cells``, a list of ``tokens``
(length of the text), ``depth`` (0 at its beginning, 1 at its end), ``score`` (share that was found) and, if there is
one, ``items`` (how many were asked).
"""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.drawing import COLOURS, INK, axes_of_a_figure, style, svg
from mea.report.parts import ABSENT, Figure, Part, Section, Table

NEEDLE = "needle"


def sections(records: Sequence[Record]) -> list[Section]:
    """One section with a map for every record."""
    figures = [_map(index, record) for index, record in enumerate(records)]
    text = "A fact is hidden in a text, at some depth; numbers are the share that the model gives back, in %."
    table = _table(records)
    return [Section("Long context", [Part("Facts found, by length and depth", text, figures=figures, table=table)])]


def _table(records: Sequence[Record]) -> Table:
    lengths = sorted({cell["tokens"] for record in records for cell in record["results"]["cells"]})
    lines = []
    for record in records:
        line = [_name(record)]
        for length in [*lengths, None]:
            scores = [c["score"] for c in record["results"]["cells"] if length in (c["tokens"], None)]
            line.append(f"{100 * sum(scores) / len(scores):.0f}" if scores else ABSENT)
        lines.append(line)
    items = sorted({cell["items"] for record in records for cell in record["results"]["cells"] if "items" in cell})
    note = "Mean over depths, in %." + (f" Each cell of a map: {' or '.join(map(str, items))} facts." if items else "")
    return Table(["model", *(f"{length:,} tokens" for length in lengths), "all"], lines, note)


def _map(index: int, record: Record) -> Figure:
    cells: list[dict[str, Any]] = record["results"]["cells"]
    lengths, depths = sorted({c["tokens"] for c in cells}), sorted({c["depth"] for c in cells})
    name = f"needle-{index}"
    with style(name):
        figure, axes = axes_of_a_figure()
        axes.grid(visible=False)
        for cell in cells:
            x, y = lengths.index(cell["tokens"]), depths.index(cell["depth"])
            axes.barh(y, 0.96, left=x - 0.48, height=0.94, color=COLOURS[0], alpha=0.08 + 0.62 * cell["score"])
            axes.text(x, y, f"{100 * cell['score']:.0f}", ha="center", va="center", fontsize=9, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xlabel("length of the text, tokens")
        axes.set_ylabel("depth of the fact")
        return Figure(name, svg(figure), _name(record))


def _name(record: Record) -> str:
    return str(record["config"].get("label") or record["config"].get("model", "?"))
