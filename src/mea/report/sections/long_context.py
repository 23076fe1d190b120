"""Long context: scores by length and depth of the fact, loss by position, models compared.

Kinds of records, as `mea.evaluate.long_context` makes them. ``"long context"``: ``config.label`` or ``config.model``;
``results.cells``, a list of ``task``, ``tokens`` (length), ``depth`` (0 at the beginning of the text, 1 at its end,
None if the answer is in several places), ``chance``, ``cache_bytes`` and three scores (`SCORES`) with ``mean`` and
``standard_error``; ``samples``, task -> length -> score -> a number for each prompt; ``results.positions``, if there,
as in `comparison_rows`. ``"paired long context"``: ``config.first`` and ``second``, ``results.lengths``,
``results.tasks`` and ``results.positions`` with differences.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from mea.records import Record
from mea.report.formatting import ABSENT, with_error, with_interval
from mea.report.parts import Figure, Part, Section, Table
from mea.report.render.svg import COLOURS, INK, axes_of_a_figure, style, svg
from mea.report.render.terminal import TerminalTable
from mea.report.sources import name_of, reference_first

LONG, PAIRED = "long context", "paired long context"  # kinds of records
MAPPED = {"needle": "one fact", "multi-key": "one of eight facts"}
SCORES = {"exact": "written", "choice": "preferred", "logprob": "nats"}
MEANING = (
    "Written: share of questions in % where the first word of greedy decoding is right. Preferred: share in % where "
    "the right answer is likelier than every wrong one offered; guess is that share by guessing. Nats: log-likelihood "
    "of the right answer. ± is one standard error over prompts."
)


def sections(records: Sequence[Record]) -> list[Section]:
    """One section: maps, scores, loss by position, and every comparison."""
    return [Section("Long context", _parts(records, figures=True))]


def context_tables(records: Sequence[Record]) -> list[TerminalTable]:
    """The same for a terminal, without figures."""
    return [TerminalTable(part) for part in _parts(records, figures=False) if part.table]


def _parts(records: Sequence[Record], *, figures: bool) -> list[Part]:
    models = reference_first(records, LONG, PAIRED)
    parts = [maps(models)] if figures and any(map(_mapped, models)) else []
    parts += [scores(models)] if any(record["results"]["cells"] for record in models) else []
    parts += [positions(models)] if any(record["results"].get("positions") for record in models) else []
    return parts + [part for record in records if record["kind"] == PAIRED for part in differences(record)]


def maps(records: Sequence[Record]) -> Part:
    """A map for every model and every task whose facts have a depth."""
    figures = [
        _map(f"{task}-{index}", record, task) for index, record in enumerate(records) for task in _mapped(record)
    ]
    text = "A fact stands at some depth of a text, and a question at the end asks for it. " + MEANING
    return Part("Facts retrieved, by length and depth", text, figures=figures)


def scores(records: Sequence[Record]) -> Part:
    """Every score by task and length, all depths together."""
    lines = []
    for record in records:
        for task, lengths in record["samples"].items():
            for tokens, by_score in lengths.items() if task != "position" else ():
                cells = [x for x in record["results"]["cells"] if (x["task"], str(x["tokens"])) == (task, tokens)]
                cache = sum(cell["cache_bytes"] for cell in cells) / len(cells)
                line = [_name(record), task, f"{int(tokens):,}", str(len(by_score["exact"]))]
                line += [_percent(by_score[score]) for score in ("exact", "choice")]
                line += [f"{100 * cells[0]['chance']:.0f}", with_error(*_mean(by_score["logprob"]))]
                lines.append([*line, f"{cache / 2**20:,.1f}"])
    header = ["model", "task", "tokens", "items", "written", "preferred", "guess", "nats", "MiB"]
    note = MEANING + " MiB: measured size of the cache after the text."
    return Part("Scores by length", table=Table(header, lines, note, texts=3))


def positions(records: Sequence[Record]) -> Part:
    """Perplexity in each range of positions."""
    chosen = [record for record in records if record["results"].get("positions")]
    ranges = sorted({(part["start"], part["stop"]) for record in chosen for part in record["results"]["positions"]})
    lines = []
    for record in chosen:
        own = {(part["start"], part["stop"]): part for part in record["results"]["positions"]}
        values = [own.get(stretch) for stretch in ranges]
        shown = [with_error(x["perplexity"], x["standard_error"]) if x else ABSENT for x in values]
        lines.append([_name(record), *shown])
    text = chosen[0]["config"].get("position_text", "a text")
    note = f"Perplexity on {text} of the tokens at these positions. ± is one standard error."
    header = ["model", *(f"{start:,} to {stop:,}" for start, stop in ranges)]
    return Part("Perplexity by position", table=Table(header, lines, note))


def differences(record: Record) -> list[Part]:
    """Two models prompt by prompt, and block by block of the text."""
    config, results, parts = record["config"], record["results"], []
    heading, lines = f"{config['first']} against {config['second']}", []
    for gap in results["lengths"]:
        p_value = ABSENT if gap["p_value"] is None else f"{gap['p_value']:.2g}"
        name = [gap["task"], SCORES[gap["score"]], f"{gap['tokens']:,}", str(gap["items"])]
        lines.append([*name, _gap(gap, gap["score"]), p_value])
    whole = len(lines)
    for task, by_score in results["tasks"].items():
        lines += [[task, SCORES[score], "all", "", _gap(gap, score), ""] for score, gap in by_score.items()]
    note = (
        f"Score of {config['first']} minus score of {config['second']} in percentage points (nats: log-likelihood), "
        "with 95 % intervals from resampled prompts."
    )
    header = ["task", "score", "tokens", "prompts", "difference", "McNemar's p"]
    best = tuple(range(whole, len(lines)))
    parts += [Part(heading, table=Table(header, lines, note, best, texts=3))] if lines else []
    if results["positions"]:
        edges = [0, *(gap["stop"] for gap in results["positions"])]
        lines = [
            [f"{start:,} to {gap['stop']:,}", f"{gap['items']:,}", _gap(gap, "logprob")]
            for start, gap in zip(edges, results["positions"], strict=False)
        ]
        note = (
            f"Loss of {config['first']} minus loss of {config['second']}, nats per token; 95 % intervals over blocks."
        )
        table = Table(["position", "blocks", "difference"], lines, note)
        parts.append(Part(f"{heading}, loss by position", table=table))
    return parts


def _mapped(record: Record) -> list[str]:
    tasks = {cell["task"] for cell in record["results"]["cells"] if cell["depth"] is not None}
    return [task for task in MAPPED if task in tasks]


def _map(name: str, record: Record, task: str) -> Figure:
    cells = [cell for cell in record["results"]["cells"] if cell["task"] == task and cell["depth"] is not None]
    lengths, depths = sorted({c["tokens"] for c in cells}), sorted({c["depth"] for c in cells})
    with style(name):
        figure, axes = axes_of_a_figure("length of the text, tokens", "depth of the fact")
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
        items = sorted({cell["items"] for cell in cells})
        counts = f"{items[0]} to {items[-1]}" if len(items) > 1 else str(items[0])
        chance = f"guessing would prefer the right answer in {100 * cells[0]['chance']:.0f} %"
        caption = (
            f"{_name(record)}, {MAPPED[task]}: written · preferred, in % of {counts} facts in each cell; {chance}."
        )
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


def _gap(gap: dict[str, Any], score: str) -> str:
    """A difference in points, or in nats."""
    factor, digits = (1, 3) if score == "logprob" else (100, 1)
    return with_interval(factor * gap["difference"], [factor * end for end in gap["interval"]], digits, "+")
