"""Long context: heat maps of what is found at which depth, scores by length, loss by position, models compared.

Kinds of records, as `mea.evaluate.long_context` makes them. ``"long context"``: ``config.label`` or ``config.model``;
``results.cells``, a list of ``task``, ``tokens`` (length), ``depth`` (0 at the beginning of the text, 1 at its end,
None if the answer is in no one place), ``chance``, ``cache_bytes`` and three scores (`SCORES`) with ``mean`` and
``standard_error``; ``samples``, task -> length -> score -> a number for each prompt; ``results.positions``, if there,
as in `comparison_rows`. ``"paired long context"``: ``config.first`` and ``second``, ``results.lengths``,
``results.tasks`` and ``results.positions`` with differences.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from rich.console import Group

from mea.records import Record
from mea.report.parts import ABSENT, Figure, Part, Section, Table, terminal, with_interval
from mea.report.render.svg import COLOURS, INK, axes_of_a_figure, style, svg
from mea.report.sections.comparison_rows import with_error
from mea.report.sources import name_of, reference_first

LONG, PAIRED = "long context", "paired long context"  # kinds of records
MAPPED = {"needle": "one fact", "multi-key": "one of eight facts"}
SCORES = {"exact": "written", "choice": "preferred", "logprob": "nats"}
MEANING = (
    "Written: the first word that greedy decoding gives is the right one, in %. Preferred: the right answer is "
    "likelier than every wrong one that is offered, in %, which guessing would give in so many. Nats: log-likelihood "
    "of the right answer. ± is one standard error over prompts."
)


def sections(records: Sequence[Record]) -> list[Section]:
    """One section: maps, scores, loss by position, and every comparison."""
    return [Section("Long context", _parts(records, figures=True))]


def context_tables(records: Sequence[Record]) -> list[Group]:
    """The same for a terminal, without figures."""
    return [terminal(part) for part in _parts(records, figures=False) if part.table]


def _parts(records: Sequence[Record], *, figures: bool) -> list[Part]:
    found = reference_first(records, LONG, PAIRED)
    parts = [maps(found)] if figures and any(_mapped(record) for record in found) else []
    parts += [scores(found)] if any(record["results"]["cells"] for record in found) else []
    parts += [positions(found)] if any(record["results"].get("positions") for record in found) else []
    return parts + [part for one in records if one["kind"] == PAIRED for part in differences(one)]


def maps(records: Sequence[Record]) -> Part:
    """A map for every model and every task whose answers have a depth."""
    figures = [
        _map(f"{task}-{index}", record, task) for index, record in enumerate(records) for task in _mapped(record)
    ]
    text = "A fact is hidden in a text, at some depth, and asked for at its end. " + MEANING
    return Part("Facts found, by length and depth", text, figures=figures)


def scores(records: Sequence[Record]) -> Part:
    """Every score by task and length, all depths together."""
    lines = []
    for record in records:
        for task, lengths in record["samples"].items():
            for tokens, by_score in lengths.items() if task != "position" else ():
                cells = [x for x in record["results"]["cells"] if (x["task"], str(x["tokens"])) == (task, tokens)]
                held = sum(cell["cache_bytes"] for cell in cells) / len(cells)
                line = [_name(record), task, f"{int(tokens):,}", str(len(by_score["exact"]))]
                line += [_percent(by_score[score]) for score in ("exact", "choice")]
                line += [f"{100 * cells[0]['chance']:.0f}", with_error(*_mean(by_score["logprob"]))]
                lines.append([*line, f"{held / 2**20:,.1f}"])
    header = ["model", "task", "tokens", "items", "written", "preferred", "guess", "nats", "MiB"]
    note = MEANING + " MiB: what the cache really holds after the text."
    return Part("Scores by length", table=Table(header, lines, note, texts=3))


def positions(records: Sequence[Record]) -> Part:
    """Perplexity in each range of positions."""
    chosen = [record for record in records if record["results"].get("positions")]
    ranges = sorted({(part["start"], part["stop"]) for record in chosen for part in record["results"]["positions"]})
    lines = []
    for record in chosen:
        own = {(part["start"], part["stop"]): part for part in record["results"]["positions"]}
        values = [own.get(place) for place in ranges]
        shown = [with_error(x["perplexity"], x["standard_error"]) if x else ABSENT for x in values]
        lines.append([_name(record), *shown])
    text = chosen[0]["config"].get("position_text", "a text")
    note = f"Perplexity on {text} of tokens that have so many before them. ± is one standard error."
    header = ["model", *(f"{start:,} to {stop:,}" for start, stop in ranges)]
    return Part("Perplexity by position", table=Table(header, lines, note))


def differences(record: Record) -> list[Part]:
    """Two models prompt by prompt, and block by block of the text."""
    config, results, parts = record["config"], record["results"], []
    heading, lines = f"{config['first']} against {config['second']}", []
    for found in results["lengths"]:
        value = ABSENT if found["p_value"] is None else f"{found['p_value']:.2g}"
        name = [found["task"], SCORES[found["score"]], f"{found['tokens']:,}", str(found["items"])]
        lines.append([*name, _gap(found, found["score"]), value])
    whole = len(lines)
    for task, by_score in results["tasks"].items():
        lines += [[task, SCORES[score], "all", "", _gap(found, score), ""] for score, found in by_score.items()]
    note = (
        f"Score of {config['first']} less that of {config['second']}: percentage points, or nats of log-likelihood; "
        "with 95 % intervals from resampled prompts."
    )
    header = ["task", "score", "tokens", "prompts", "difference", "McNemar's p"]
    best = tuple(range(whole, len(lines)))
    parts += [Part(heading, table=Table(header, lines, note, best, texts=3))] if lines else []
    if results["positions"]:
        edges = [0, *(found["stop"] for found in results["positions"])]
        lines = [
            [f"{start:,} to {found['stop']:,}", f"{found['items']:,}", _gap(found, "logprob")]
            for start, found in zip(edges, results["positions"], strict=False)
        ]
        note = f"Loss of {config['first']} less that of {config['second']}, nats per token; 95 % intervals over blocks."
        table = Table(["position", "blocks", "difference"], lines, note)
        parts.append(Part(f"{heading}, loss by position", table=table))
    return parts


def _mapped(record: Record) -> list[str]:
    there = {cell["task"] for cell in record["results"]["cells"] if cell["depth"] is not None}
    return [task for task in MAPPED if task in there]


def _map(name: str, record: Record, task: str) -> Figure:
    cells: list[dict[str, Any]] = [cell for cell in record["results"]["cells"] if cell["task"] == task]
    lengths, depths = sorted({c["tokens"] for c in cells}), sorted({c["depth"] for c in cells})
    with style(name):
        figure, axes = axes_of_a_figure()
        figure.set_figheight(1.1 + 0.4 * len(depths))
        axes.grid(visible=False)
        for cell in cells:
            x, y = lengths.index(cell["tokens"]), depths.index(cell["depth"])
            written, preferred = (cell[score]["mean"] for score in ("exact", "choice"))
            axes.barh(y, 0.96, left=x - 0.48, height=0.94, color=COLOURS[0], alpha=0.08 + 0.62 * written)
            text = f"{100 * written:.0f} · {100 * preferred:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xlabel("length of the text, tokens")
        axes.set_ylabel("depth of the fact")
        items = sorted({cell["items"] for cell in cells})
        counts = f"{items[0]} to {items[-1]}" if len(items) > 1 else str(items[0])
        chance = f"guessing prefers the right one in {100 * cells[0]['chance']:.0f} %"
        caption = f"{_name(record)}, {MAPPED[task]}: written · preferred, in % of {counts} facts a cell; {chance}"
        return Figure(name, svg(figure), caption)


def _name(record: Record) -> str:
    name, bits = name_of(record), record["config"].get("cache_bits")
    return f"{name}, {bits}-bit cache" if bits else name


def _mean(values: Sequence[float | int]) -> tuple[float, float | None]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _percent(values: Sequence[float | int]) -> str:
    mean, error = _mean(values)
    return f"{100 * mean:.0f}" + (f" ± {100 * error:.0f}" if error is not None else "")


def _gap(found: dict[str, Any], score: str) -> str:
    """A difference in points, or in nats."""
    factor, digits = (1, 3) if score == "logprob" else (100, 1)
    return with_interval(factor * found["difference"], [factor * end for end in found["interval"]], digits, "+")
