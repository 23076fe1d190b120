"""How figures of the page are drawn: SVG that takes its text colour and font from the page around it."""

import io
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from mea.names import printable
from mea.report.formatting import learning_rate

INK = "#010203"  # stands for the page's text colour, which differs between light and dark
COLOURS = ("#2f86d6", "#e0662b", "#22a06b", "#a66be0", "#c99a06", "#d6479a")
MARKERS = ("o", "s", "^", "D", "v", "P")
LONGEST_LABEL = 60  # letters; the time to lay out a figure grows with the length of its labels
LONGEST_TEXT = 200  # letters of any text, such as the label of an axis
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


def line(index: int, size: int = 7) -> dict[str, Any]:
    """Colour and marker of the line with this number; below zero a star without a line."""
    if index < 0:
        return {"color": INK, "marker": "*", "markersize": 11, "linestyle": "none"}
    turn = index // len(COLOURS)  # of the colours: then with other markers and dashes
    look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + turn) % len(MARKERS)]}
    return look | {"markersize": size, "linewidth": 1.8, "linestyle": DASHES[turn % len(DASHES)]}


def logarithmic(axes: Any, which: str = "y") -> None:
    """A logarithmic axis, ``"x"`` or ``"y"``, whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
    axis.set_minor_formatter(NullFormatter())


def style(salt: str) -> AbstractContextManager[None]:
    """Settings of one figure; its name keeps the ids of several figures on one page apart."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}
    settings["text.parse_math"] = False  # names come from records: "$" in one is a letter
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "legend.labelcolor": INK}
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        settings[part] = INK
    return rc_context(settings)


def axes_of_a_figure(x: str = "", y: str = "") -> tuple[Any, Any]:
    """A figure of the page's size, and its axes with their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    _label(axes, x, y)
    return figure, axes


def two_panels(titles: tuple[str, str], x: str, y: str) -> tuple[Any, Any]:
    """A figure of two axes side by side that share a logarithmic vertical axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, label in zip(panels, titles, (y, ""), strict=True):
        axes.set_yscale("log")
        axes.set_title(title, fontsize=11)
        _label(axes, x, label)
    return figure, panels


def _label(axes: Any, x: str, y: str) -> None:
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def learning_rate_axis(axes: Any, values: Iterable[float | int]) -> None:
    """A logarithmic horizontal axis with a tick at each learning rate."""
    ticks = sorted(set(values))
    axes.set_xscale("log")
    axes.set_xticks(ticks, list(map(learning_rate, ticks)))
    axes.set_xticks([], minor=True)


def short(label: str) -> str:
    """A label that fits a figure: its beginning and its end."""
    label = printable(label)
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 20]}…{label[-19:]}"


def legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides nothing, with as many columns as the names allow; to be read line by line."""
    handles, labels = axes.get_legend_handles_labels()
    labels = list(map(short, labels))
    if not labels:
        return
    columns = max(1, min(len(labels), 64 // (max(map(len, labels)) + 6)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.25 * rows)
    order = _line_by_line(len(labels), columns)
    handles, labels = [handles[index] for index in order], [labels[index] for index in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _line_by_line(count: int, columns: int) -> list[int]:
    """The order that matplotlib, which fills columns first, shows line by line."""
    return [index for column in range(columns) for index in range(column, count, columns)]


def svg(figure: Any) -> str:
    """The bare ``<svg>`` element: no prolog, no metadata, no names of other places."""
    from matplotlib.text import Text

    for label in figure.findobj(lambda artist: isinstance(artist, Text) and len(artist.get_text()) > LONGEST_TEXT):
        label.set_text(short(label.get_text()))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = printable(buffer.getvalue())
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups, and figures share a page
    text = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1; font-family: inherit", text)
    return text.replace(INK, "currentColor").replace("<svg", '<svg role="img"', 1)


def standalone(svg: str) -> str:
    """A file of its own from what `svg` gives: grey text, which can be read on light and on dark ground."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="sans-serif"'
    return svg.replace("currentColor", "#777").replace("<svg", f"<svg {names}", 1) + "\n"
