"""Figures of compared methods: perplexity by cache size and by position in the text, loss by layer."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from mea.report.parts import Figure
from mea.report.render.svg import INK, axes_of_a_figure, legend, line, logarithmic, style, svg
from mea.report.sections.comparison_rows import Row, texts_of

FAR = 8.0  # times the lowest ratio: a line further away would flatten the others
ERRORS = "Bars: one standard error."
SIZE, SHARE = "cache, KiB per token (measured)", "cache, % of the uncompressed bytes (measured)"
BITS = {8: "#174ea6", 4: "#2f86d6", 2: "#9cc9f0"}  # darker for more


def figures(methods: Sequence[Row]) -> list[Figure]:
    """All figures that the measurements suffice for."""
    drawn = [
        perplexity_against_bytes(methods),
        ratio_against_bytes(methods, "texts"),
        ratio_against_bytes(methods, "continuations"),
        ratio_by_position(methods),
        loss_by_layer(methods),
        *(bits_by_layer(row.name, row.record["config"]) for row in _one_of_each(methods)),
    ]
    return [figure for figure in drawn if figure]


def perplexity_against_bytes(methods: Sequence[Row]) -> Figure | None:
    """Perplexity on the main text against measured cache bytes per token; a line joins the sizes of one method."""
    text = next(iter(texts_of(methods)), "")
    scores = {row.name: row.measured("texts").get(text, {}) for row in methods}
    points = [row for row in methods if scores[row.name].get("perplexity") and row.bytes_per_token]
    if len(points) < 2:
        return None
    values = {row.name: scores[row.name]["perplexity"] for row in points}
    near, note = _near(points, {name: [value] for name, value in values.items()}, "")
    series = dict.fromkeys(row.series for row in methods if row.compressed)
    look = {name: line(index) for index, name in enumerate(series)}
    with style("bytes"):
        figure, axes = axes_of_a_figure(SIZE, f"perplexity on {text}")
        for name in dict.fromkeys(row.series for row in near):
            group = _by_size(near, name)
            errors = [scores[row.name].get("standard_error") or 0 for row in group]
            _plot_sizes(axes, group, [values[row.name] for row in group], errors, look.get(name, line(-1)))
        shown = [values[row.name] for row in near]
        if max(shown) > 4 * min(shown):
            logarithmic(axes)
        axes.set_xlim(left=0)
        legend(figure, axes)
        caption = "Perplexity against the size of the cache; lower and further to the left is better."
        return Figure("bytes", svg(figure), f"{caption} {ERRORS} {note}".strip())


def ratio_against_bytes(methods: Sequence[Row], kind: str) -> Figure | None:
    """Ratio to the uncompressed model against measured bytes, where sizes differ; a line joins one method's sizes.

    `kind` is ``"texts"`` or ``"continuations"``, of which the first text is drawn.
    """
    text = next(iter(texts_of(methods, kind)), "")
    scores = {row.name: row.measured(kind).get(text, {}) for row in methods}
    points = [row for row in methods if row.compressed and scores[row.name].get("ratio") and row.bytes_per_token]
    if len({row.bytes_per_token for row in points}) < 3:
        return None
    values = {row.name: scores[row.name]["ratio"] for row in points}
    near, note = _near(points, {name: [value] for name, value in values.items()}, " times")
    plain = next((row.bytes_per_token for row in methods if not row.compressed), None)
    unit = (plain or 102400) / 100  # KiB without the uncompressed model
    with style(f"pareto-{kind}"):
        figure, axes = axes_of_a_figure(SHARE if plain else SIZE, f"{text}:\nperplexity / uncompressed")
        for index, name in enumerate(dict.fromkeys(row.series for row in points)):
            if group := _by_size(near, name):
                errors = [scores[row.name].get("ratio_standard_error") or 0 for row in group]
                _plot_sizes(axes, group, [values[row.name] for row in group], errors, line(index, size=5), unit)
        if max(values[row.name] for row in near) > 2:  # below, a log axis would have one labelled tick
            logarithmic(axes)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        logarithmic(axes, "x")
        legend(figure, axes)
        scored = "whole windows" if kind == "texts" else "continuations of a context in the cache"
        caption = (
            f"Perplexity ratio of {scored} against the size of the cache; lower and further to the left is better."
        )
        return Figure(f"pareto-{kind}", svg(figure), f"{caption} {ERRORS} {note}".strip())


def ratio_by_position(methods: Sequence[Row]) -> Figure | None:
    """Ratio to the uncompressed model in each range of positions."""
    compressed = [row for row in methods if row.compressed]
    ratios = {row.name: [part.get("ratio") for part in row.results.get("positions") or []] for row in compressed}
    lines = [row for row in compressed if ratios[row.name] and all(ratios[row.name])]
    if not lines:
        return None
    near, note = _near(lines, {row.name: ratios[row.name] for row in lines}, " times")
    with style("positions"):
        figure, axes = axes_of_a_figure("position in the text (tokens)", "perplexity / uncompressed")
        for row in near:
            parts = row.results["positions"]
            errors = [part.get("ratio_standard_error") or 0 for part in parts]
            look = line(compressed.index(row))
            axes.errorbar(range(len(parts)), ratios[row.name], yerr=errors, label=row.name, **look)
        parts = lines[0].results["positions"]
        axes.set_xticks(range(len(parts)), [_range(part["start"], part["stop"]) for part in parts])
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        legend(figure, axes)
        text = next((row.results["position_text"] for row in methods if "position_text" in row.results), "a long text")
        caption = f"Perplexity ratio by position, in one pass over {text}."
        return Figure("positions", svg(figure), f"{caption} {ERRORS} {note}".strip())


def loss_by_layer(methods: Sequence[Row]) -> Figure | None:
    """The loss in each layer by the fit; a quantised cache and recovery training leave it as it is: not drawn."""
    compressed = [row for row in methods if row.compressed]
    fitted = [row for row in compressed if not {"bits", "recovery"} & row.record["config"].keys()]
    lines = [row for row in fitted if row.measured("layers").get("values")]
    if not lines:
        return None
    what = lines[0].results["layers"].get("what", "loss")  # of the best method; other quantities have other units
    lines = [row for row in lines if row.results["layers"].get("what", "loss") == what]
    with style("layers"):
        figure, axes = axes_of_a_figure("layer", fill(what, 32))
        for row in lines:
            values = row.results["layers"]["values"]
            axes.plot(range(len(values)), values, label=row.name, **line(compressed.index(row), size=4))
        shown = [value for row in lines for value in row.results["layers"]["values"]]
        if min(shown) > 0 and max(shown) > 20 * min(shown):
            logarithmic(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes)
        return Figure("layers", svg(figure), "Loss in each layer, counted from 0, as the fit measured it.")


def _one_of_each(methods: Sequence[Row]) -> list[Row]:
    """Of every series of packed caches the one whose size is nearest to a fifth."""
    packed = [row for row in methods if row.record["config"].get("tiers")]
    nearest = sorted(packed, key=lambda row: abs((row.record["config"].get("keep") or 1) - 0.2))
    return list({row.series: row for row in reversed(nearest)}.values())[::-1]


def bits_by_layer(name: str, config: dict[str, Any]) -> Figure:
    """How many components of each layer have 8, 4, 2 and 0 bits: what the budget was spent on."""
    layers = [layer or [[0, 0, 0]] * 2 for layer in config["tiers"]]
    parts = ["keys", "values less their prediction from keys"] if min(map(len, layers)) == 2 else ["keys and values"]
    with style(f"bits-{name}"):
        figure, axes = axes_of_a_figure("layer", "components")
        left = [0.0] * len(layers)
        for part, of in enumerate(parts):
            for tier, (bits, colour) in enumerate(BITS.items()):
                counts = [layer[part][tier] for layer in layers]
                look = {"color": colour, "hatch": "///" if part else None, "edgecolor": INK, "linewidth": 0.2}
                axes.bar(range(len(layers)), counts, bottom=left, width=0.9, label=f"{of}, {bits} bits", **look)
                left = [a + b for a, b in zip(left, counts, strict=True)]
        if config.get("numbers"):
            axes.axhline(config["numbers"], color=INK, linewidth=0.8, linestyle=":")
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes)
        caption = f"{name}: bits of the components of each layer; the others, up to the dotted line, have none."
        return Figure(f"bits-{name}", svg(figure), caption)


def _by_size(methods: Sequence[Row], series: str) -> list[Row]:
    return sorted((row for row in methods if row.series == series), key=lambda row: row.bytes_per_token or 0)


def _plot_sizes(
    axes: Any,
    group: list[Row],
    values: Sequence[float | int],
    errors: Sequence[float | int],
    look: dict[str, Any],
    unit: float = 1024,
) -> None:
    sizes = [(row.bytes_per_token or 0) / unit for row in group]
    look = look | ({"linestyle": "none"} if len(group) == 1 else {})
    axes.errorbar(sizes, values, yerr=errors, label=group[0].series, **look)


def _near(methods: Sequence[Row], values: dict[str, list[float | int]], unit: str) -> tuple[list[Row], str]:
    """The rows whose highest value is within `FAR` times the lowest such one, and a note that names the others."""
    limit = FAR * min(max(value) for value in values.values())
    near = [row for row in methods if max(values[row.name]) <= limit]
    far = {row.name: (min(values[row.name]), max(values[row.name])) for row in methods if row not in near}
    ends = (f"{name} ({' to '.join(f'{x:,.0f}' for x in dict.fromkeys(pair))}{unit})" for name, pair in far.items())
    return near, f"Outside the axes: {'; '.join(ends)}." if far else ""


def _range(start: int, stop: int) -> str:
    return "-".join(f"{edge // 1024}k" if edge and edge % 1024 == 0 else str(edge) for edge in (start, stop))
