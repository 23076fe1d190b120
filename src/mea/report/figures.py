"""The figures of the page, as SVG that takes its text colour and font from the page around it."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from textwrap import fill
from typing import Any

from mea.report.rows import Row, texts_of

INK = "#010203"  # stands for the page's text colour, which differs between light and dark
COLOURS = ("#2f86d6", "#e0662b", "#22a06b", "#a66be0", "#c99a06", "#d6479a")
MARKERS = ("o", "s", "^", "D", "v", "P")
FAR = 8.0  # times the best ratio: a line further away than that would press the others flat


def perplexity_against_bytes(found: Sequence[Row]) -> tuple[str, str] | None:
    """Perplexity on the main text against measured cache bytes per token; methods at several sizes are joined.

    With a note of the models too far off to be drawn, as `ratio_by_position`.
    """
    text = next(iter(texts_of(found)), "")
    points = [row for row in found if text in row.results.get("texts", {}) and row.results.get("cache")]
    if len(points) < 2:
        return None
    values = {row.name: row.results["texts"][text]["perplexity"] for row in points}
    near, note = _near(points, {name: [value] for name, value in values.items()}, "")
    colour = {name: index for index, name in enumerate(dict.fromkeys(row.series for row in found if row.compressed))}
    with _style("bytes"):
        figure, axes = _axes()
        for series in dict.fromkeys(row.series for row in near):
            group = [row for row in near if row.series == series]
            group.sort(key=lambda row: row.results["cache"]["bytes_per_token"])
            sizes = [row.results["cache"]["bytes_per_token"] / 1024 for row in group]
            errors = [row.results["texts"][text].get("standard_error") or 0 for row in group]
            style = _line(colour.get(series, -1)) | ({"linestyle": "none"} if len(group) == 1 else {})
            axes.errorbar(sizes, [values[row.name] for row in group], yerr=errors, label=series, **style)
        drawn = [values[row.name] for row in near]
        if max(drawn) > 10 * min(drawn):
            _logarithmic(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("cache, KiB per token (measured)")
        axes.set_ylabel(f"perplexity on {text}")
        _legend(figure, axes)
        return _svg(figure), note


def ratio_by_position(found: Sequence[Row]) -> tuple[str, str] | None:
    """Ratio to the uncompressed model in each range of positions, and a note of the methods too far off to be drawn."""
    compressed = [row for row in found if row.compressed]
    lines = [row for row in compressed if row.results.get("positions")]
    if not lines:
        return None
    near, note = _near(
        lines, {row.name: [part["ratio"] for part in row.results["positions"]] for row in lines}, " times"
    )
    with _style("positions"):
        figure, axes = _axes()
        for index, row in enumerate(compressed):
            if row not in near:
                continue
            parts = row.results["positions"]
            ratios = [part["ratio"] for part in parts]
            errors = [part.get("ratio_standard_error") or 0 for part in parts]
            axes.errorbar(range(len(parts)), ratios, yerr=errors, label=row.name, **_line(index))
        parts = lines[0].results["positions"]
        axes.set_xticks(range(len(parts)), [_range(part["start"], part["stop"]) for part in parts])
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("position in the text (tokens)")
        axes.set_ylabel("perplexity / uncompressed")
        _legend(figure, axes)
        return _svg(figure), note


def loss_by_layer(found: Sequence[Row]) -> str | None:
    """What each layer loses, for the methods whose records say it."""
    compressed = [row for row in found if row.compressed]
    lines = [row for row in compressed if row.results.get("layers")]
    if not lines:
        return None
    with _style("layers"):
        figure, axes = _axes()
        for row in lines:
            values = row.results["layers"]["values"]
            axes.plot(range(len(values)), values, label=row.name, **_line(compressed.index(row), size=4))
        positive = [value for row in lines for value in row.results["layers"]["values"]]
        if min(positive) > 0 and max(positive) > 20 * min(positive):
            _logarithmic(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(fill(lines[0].results["layers"].get("what", "loss"), 32))
        _legend(figure, axes)
        return _svg(figure)


def _near(found: Sequence[Row], values: dict[str, list[float]], unit: str) -> tuple[list[Row], str]:
    """The rows whose highest value is within `FAR` times the best one's, and a note that names the others."""
    limit = FAR * min(max(value) for value in values.values())
    near = [row for row in found if max(values[row.name]) <= limit]
    far = {row.name: (min(values[row.name]), max(values[row.name])) for row in found if row not in near}
    ends = (f"{name} ({' to '.join(f'{x:,.0f}' for x in dict.fromkeys(pair))}{unit})" for name, pair in far.items())
    return near, f"Too far off to be drawn: {'; '.join(ends)}." if far else ""


def _range(start: int, stop: int) -> str:
    return "-".join(f"{edge // 1024}k" if edge and edge % 1024 == 0 else str(edge) for edge in (start, stop))


def _line(index: int, size: int = 7) -> dict[str, Any]:
    if index < 0:
        return {"color": INK, "marker": "*", "markersize": 11, "linestyle": "none"}
    style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    return style | {"markersize": size, "linewidth": 1.8}


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _style(salt: str) -> AbstractContextManager[None]:
    """Settings of one figure; its name keeps the ids of several figures on one page apart."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "legend.labelcolor": INK}
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        settings[part] = INK
    return rc_context(settings)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides nothing, with as many columns as the names allow."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 64 // (max(map(len, labels)) + 6)))
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _svg(figure: Any) -> str:
    """The bare ``<svg>`` element: no prolog, no metadata, no names of other places."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    text = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1; font-family: inherit", text)
    return text.replace(INK, "currentColor").replace("<svg", '<svg role="img"', 1)
