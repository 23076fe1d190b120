"""The loss that compressing one layer alone adds: records of the kind ``"profile"`` (arXiv 2601.19611)."""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.parts import Figure, Part, Section, Table
from mea.report.render.svg import INK, axes_of_a_figure, legend, line, style, svg
from mea.report.render.terminal import TerminalTable

KIND = "profile"
SHOWN = ("full", "half", "deep")


def sections(records: Sequence[Record]) -> list[Section]:
    """One section for every model, its profiles in one figure."""
    models = dict.fromkeys(record["config"]["model"] for record in records)
    return [
        Section(
            f"Layer by layer: {model}",
            _parts(model, [record for record in records if record["config"]["model"] == model]),
        )
        for model in models
    ]


def profile_table(record: Record) -> TerminalTable:
    """The layers in the order of the loss that compressing them adds, for a terminal."""
    layers = sorted(enumerate(record["results"]["layers"]), key=lambda pair: pair[1]["added"])
    names = ("added", "standard_error", "relative_output_error")
    lines = [[str(index), *(f"{layer[name]:z.4f}" for name in names)] for index, layer in layers]
    header = ["layer", "added nats", "standard error", "energy lost"]
    return TerminalTable(Part(table=Table(header, lines, _note([record]))))


def _parts(model: str, records: Sequence[Record]) -> list[Part]:
    text = (
        "Increase of the loss on held-out text when one layer alone is compressed. Bars: one standard error, paired. "
        "Lines below: the layers that each of the paper's layouts compresses."
    )
    return [
        Part("One layer at a time", figures=[Figure("profile", _figure(records), text)]),
        Part("Sum of added losses over layouts", table=_sums(records)),
    ]


def _figure(records: Sequence[Record]) -> str:
    with style("profile"):
        figure, axes = axes_of_a_figure("layer", "added loss, nats per token")
        for index, record in enumerate(records):
            layers = record["results"]["layers"]
            axes.errorbar(
                range(len(layers)), [x["added"] for x in layers], yerr=[x["standard_error"] for x in layers],
                label=_name(record), **line(index, size=4),
            )  # fmt: skip
        low, high = axes.get_ylim()
        height = 0.06 * (high - low)
        layouts = {name: layers for name, layers in records[0]["config"]["layouts"].items() if name in SHOWN and layers}
        for row, (name, layers) in enumerate(layouts.items(), start=1):
            y = low - row * height
            axes.plot([layers[0] - 0.3, layers[-1] + 0.3], [y, y], color=INK, linewidth=3, alpha=0.5)
            axes.text(layers[0] - 0.6, y, name, ha="right", va="center", fontsize=9, color=INK)
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(left=-2.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes)
        return svg(figure)


def _sums(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        layers, layouts = record["results"]["layers"], record["config"]["layouts"]
        line = [_name(record)]
        for name in SHOWN:
            measured = [layer for layer in layouts.get(name, []) if layer < len(layers)]
            line.append(f"{sum(layers[layer]['added'] for layer in measured):z.3f}")
        cheapest = sorted(range(len(layers)), key=lambda layer: layers[layer]["added"])[:5]
        lines.append([*line, ", ".join(map(str, cheapest))])
    header = ["profile", *(f"sum over {name}, nats" for name in SHOWN), "five layers that add least"]
    return Table(header, lines, _note(records) + " Compressing several layers together adds more than this sum.")


def _note(records: Sequence[Record]) -> str:
    config = records[0]["config"]
    done, of = len(records[0]["results"]["layers"]), config["layers"]
    unfinished = "" if done == of else f" Unfinished: {done} of {of} layers."
    return (
        f"{config['tokens']:,} tokens of {config['text']} in windows of {config['window']:,}; layers counted from 0."
        + unfinished
    )


def _name(record: Record) -> str:
    config: dict[str, Any] = record["config"]
    return f"{config['method']}, {100 * config['keep']:.3g} % of a layer"
