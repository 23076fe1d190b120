"""The figures of the page, as SVG that takes its text colour and font from the page around it."""

from collections.abc import Sequence
from textwrap import fill

from mea.report.render.svg import INK, axes_of_a_figure, legend, line, logarithmic, style, svg
from mea.report.sections.comparison_rows import Row, texts_of

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
    with style("bytes"):
        figure, axes = axes_of_a_figure()
        for series in dict.fromkeys(row.series for row in near):
            group = [row for row in near if row.series == series]
            group.sort(key=lambda row: row.results["cache"]["bytes_per_token"])
            sizes = [row.results["cache"]["bytes_per_token"] / 1024 for row in group]
            errors = [row.results["texts"][text].get("standard_error") or 0 for row in group]
            look = line(colour.get(series, -1)) | ({"linestyle": "none"} if len(group) == 1 else {})
            axes.errorbar(sizes, [values[row.name] for row in group], yerr=errors, label=series, **look)
        drawn = [values[row.name] for row in near]
        if max(drawn) > 4 * min(drawn):
            logarithmic(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("cache, KiB per token (measured)")
        axes.set_ylabel(f"perplexity on {text}")
        legend(figure, axes)
        return svg(figure), note


def ratio_against_bytes(found: Sequence[Row], kind: str) -> tuple[str, str] | None:
    """Ratio to the uncompressed model against measured bytes, where sizes differ; methods at several sizes are joined.

    `kind` is ``"texts"`` or ``"continuations"``, of which the first text is drawn. With a note as `ratio_by_position`.
    """
    text = next((name for row in found for name in row.results.get(kind, {})), None)
    points = [row for row in found if row.compressed and text in row.results.get(kind, {}) and row.results.get("cache")]
    if text is None or len({row.results["cache"]["bytes_per_token"] for row in points}) < 3:
        return None
    values = {row.name: row.results[kind][text]["ratio"] for row in points}
    near, note = _near(points, {name: [value] for name, value in values.items()}, " times")
    series = list(dict.fromkeys(row.series for row in points))
    with style(f"pareto-{kind}"):
        figure, axes = axes_of_a_figure()
        for index, name in enumerate(series):
            group = sorted((r for r in near if r.series == name), key=lambda r: r.results["cache"]["bytes_per_token"])
            if not group:
                continue
            sizes = [row.results["cache"]["bytes_per_token"] / 1024 for row in group]
            errors = [row.results[kind][text].get("ratio_standard_error") or 0 for row in group]
            look = line(index, size=5) | ({"linestyle": "none"} if len(group) == 1 else {})
            axes.errorbar(sizes, [values[row.name] for row in group], yerr=errors, label=name, **look)
        logarithmic(axes)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(left=0)
        axes.set_xlabel("cache, KiB per token (measured)")
        axes.set_ylabel(f"{text}:\nperplexity / uncompressed")
        legend(figure, axes)
        return svg(figure), note


def ratio_by_position(found: Sequence[Row]) -> tuple[str, str] | None:
    """Ratio to the uncompressed model in each range of positions, and a note of the methods too far off to be drawn."""
    compressed = [row for row in found if row.compressed]
    lines = [row for row in compressed if row.results.get("positions")]
    if not lines:
        return None
    near, note = _near(
        lines, {row.name: [part["ratio"] for part in row.results["positions"]] for row in lines}, " times"
    )
    with style("positions"):
        figure, axes = axes_of_a_figure()
        for index, row in enumerate(compressed):
            if row not in near:
                continue
            parts = row.results["positions"]
            ratios = [part["ratio"] for part in parts]
            errors = [part.get("ratio_standard_error") or 0 for part in parts]
            axes.errorbar(range(len(parts)), ratios, yerr=errors, label=row.name, **line(index))
        parts = lines[0].results["positions"]
        axes.set_xticks(range(len(parts)), [_range(part["start"], part["stop"]) for part in parts])
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("position in the text (tokens)")
        axes.set_ylabel("perplexity / uncompressed")
        legend(figure, axes)
        return svg(figure), note


def loss_by_layer(found: Sequence[Row]) -> str | None:
    """What each layer loses, by the fit; few bits and training afterwards have no line of their own."""
    compressed = [row for row in found if row.compressed]
    own = [row for row in compressed if not {"bits", "recovery"} & row.record["config"].keys()]
    lines = [row for row in own if row.results.get("layers")]
    if not lines:
        return None
    with style("layers"):
        figure, axes = axes_of_a_figure()
        for row in lines:
            values = row.results["layers"]["values"]
            axes.plot(range(len(values)), values, label=row.name, **line(compressed.index(row), size=4))
        positive = [value for row in lines for value in row.results["layers"]["values"]]
        if min(positive) > 0 and max(positive) > 20 * min(positive):
            logarithmic(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(fill(lines[0].results["layers"].get("what", "loss"), 32))
        legend(figure, axes)
        return svg(figure)


def _near(found: Sequence[Row], values: dict[str, list[float]], unit: str) -> tuple[list[Row], str]:
    """The rows whose highest value is within `FAR` times the best one's, and a note that names the others."""
    limit = FAR * min(max(value) for value in values.values())
    near = [row for row in found if max(values[row.name]) <= limit]
    far = {row.name: (min(values[row.name]), max(values[row.name])) for row in found if row not in near}
    ends = (f"{name} ({' to '.join(f'{x:,.0f}' for x in dict.fromkeys(pair))}{unit})" for name, pair in far.items())
    return near, f"Too far off to be drawn: {'; '.join(ends)}." if far else ""


def _range(start: int, stop: int) -> str:
    return "-".join(f"{edge // 1024}k" if edge and edge % 1024 == 0 else str(edge) for edge in (start, stop))
