"""What each layer's cache is worth: the section about records of the kind ``"profile"`` (arXiv 2601.19611)."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from mea.records import Record
from mea.report.parts import Figure, Part, Section, Table
from mea.report.render.svg import INK, axes_of_a_figure, legend, line, style, svg

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


def profile_table(record: Record) -> RichTable:
    """The layers from cheapest to dearest, for a terminal."""
    table = RichTable(box=SIMPLE_HEAD, caption=_note([record]), caption_justify="left")
    for index, title in enumerate(("layer", "added nats", "standard error", "energy lost")):
        table.add_column(title, justify="right" if index else "left")
    layers = list(enumerate(record["results"]["layers"]))
    for place, found in sorted(layers, key=lambda pair: pair[1]["added"]):
        table.add_row(str(place), f"{found['added']:.4f}", f"{found['standard_error']:.4f}", f"{found['lost']:.4f}")
    return table


def _parts(model: str, records: Sequence[Record]) -> list[Part]:
    text = (
        "One layer at a time is compressed and nothing else; the loss on held-out text rises by so much. Bars: one "
        "standard error, paired. Beneath, the layers that each of the paper's layouts compresses."
    )
    return [
        Part("One layer at a time", figures=[Figure("profile", _figure(records), text)]),
        Part("Sums over layouts", table=_sums(records)),
    ]


def _figure(records: Sequence[Record]) -> str:
    with style("profile"):
        figure, axes = axes_of_a_figure()
        for index, record in enumerate(records):
            layers = record["results"]["layers"]
            axes.errorbar(
                range(len(layers)), [x["added"] for x in layers], yerr=[x["standard_error"] for x in layers],
                label=_name(record), **line(index, size=4),
            )  # fmt: skip
        low, high = axes.get_ylim()
        height = 0.06 * (high - low)
        layouts = records[0]["config"]["layouts"]
        for row, name in enumerate(SHOWN, start=1):
            y = low - row * height
            places = layouts[name]
            axes.plot([places[0] - 0.3, places[-1] + 0.3], [y, y], color=INK, linewidth=3, alpha=0.5)
            axes.text(places[0] - 0.6, y, name, ha="right", va="center", fontsize=9, color=INK)
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(left=-2.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("added loss, nats per token")
        legend(figure, axes)
        return svg(figure)


def _sums(records: Sequence[Record]) -> Table:
    lines = []
    for record in records:
        layers, layouts = record["results"]["layers"], record["config"]["layouts"]
        line = [_name(record)]
        for name in SHOWN:
            places = [place for place in layouts[name] if place < len(layers)]
            line.append(f"{sum(layers[place]['added'] for place in places):.3f}")
        cheapest = sorted(range(len(layers)), key=lambda place: layers[place]["added"])[:5]
        lines.append([*line, ", ".join(map(str, cheapest))])
    header = ["profile", *(f"sum over {name}, nats" for name in SHOWN), "five cheapest layers"]
    return Table(header, lines, _note(records) + " Losses of several layers together are larger than their sum.")


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
