"""Methods of compression side by side: the section about records of the kind ``"comparison"``."""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.parts import Figure, Part, Section, Table
from mea.report.sections import comparison_figures
from mea.report.sections.comparison_rows import Row, cells, footnote, rows, texts_of


def sections(records: Sequence[Record]) -> list[Section]:
    """One section for every model."""
    found = rows(records)
    shared = _shared(found)
    models = dict.fromkeys(row.model for row in found)
    halved = "Half the KV cache of " if _halved(found) else "A smaller KV cache for "
    return [Section(halved + model, _parts([row for row in found if row.model == model], shared)) for model in models]


def _parts(found: list[Row], shared: dict[str, Any]) -> list[Part]:
    compressed = [row for row in found if row.compressed]
    best = min(compressed, key=lambda row: row.main_ratio, default=None)
    texts = texts_of(found)
    chosen = tuple(index for index, row in enumerate(found) if row is best)
    parts = [Part(numbers=_summary(found[0], best, texts))]
    parts.append(Part("Methods side by side", table=Table(*cells(found), footnote(found), chosen)))
    if drawn := _figures(found):
        parts.append(Part("What it costs, and where", figures=drawn))
    said = [(row.name, row.results["continuation"]) for row in found if row.results.get("continuation")]
    if said:
        quotes = [(name, continuation["text"].strip()) for name, continuation in said]
        parts.append(Part("The same prompt, continued", f"{said[0][1]['prompt']} …", quotes=quotes))
    return [*parts, _what_ran(found, shared)]


def _figures(found: list[Row]) -> list[Figure]:
    drawn = []
    if made := comparison_figures.perplexity_against_bytes(found):
        text = f"Lower is better, and so is further to the left. Bars: one standard error. {made[1]}"
        drawn.append(Figure("bytes", made[0], text.strip()))
    for kind, title in (
        ("texts", "whole windows"),
        ("continuations", "continuations of a context in the cache"),
    ):
        if made := comparison_figures.ratio_against_bytes(found, kind):
            note = f"Lower and further to the left is better: {title}. {made[1]}"
            drawn.append(Figure(f"pareto-{kind}", made[0], note.strip()))
    if made := comparison_figures.ratio_by_position(found):
        where = next((row.results["position_text"] for row in found if "position_text" in row.results), "a long text")
        text = f"One pass over {where}: does the loss grow with the context? Bars: one standard error. {made[1]}"
        drawn.append(Figure("positions", made[0], text.strip()))
    if layers := comparison_figures.loss_by_layer(found):
        drawn.append(Figure("layers", layers, "Layer by layer, counted from 0."))
    return drawn


def _summary(plain: Row, best: Row | None, texts: list[str]) -> list[tuple[str, str]]:
    """The three numbers to take away: of the best method, against the uncompressed model."""
    if best is None or plain.compressed:
        return []
    numbers = []
    sizes = [row.results.get("cache", {}).get("bytes_per_token") for row in (plain, best)]
    if all(sizes):
        numbers.append((f"{100 * sizes[1] / sizes[0]:.3g} %", f"of the cache: {sizes[1]:,.0f} bytes per token"))
    if texts and best.main_ratio < float("inf"):
        numbers.append((f"× {best.main_ratio:.2f}", f"perplexity on {texts[0]}"))
    speed = best.results.get("decode", {}).get("ratio")
    if speed:
        context = best.results["decode"].get("context")
        numbers.append((f"× {speed:.2f}", "time per token" + (f" after {context:,} tokens" if context else "")))
    return [*numbers, (best.name, "the best of the methods compared")] if numbers else []


def _halved(found: list[Row]) -> bool:
    return all(abs((row.record["config"].get("keep") or 0) - 0.5) < 0.01 for row in found if row.compressed)


def _what_ran(found: list[Row], shared: dict[str, Any]) -> Part:
    """Every choice that is not the same for all models; the others below."""
    lines = []
    for row in found:
        own = {name: value for name, value in _config(row).items() if name not in shared and name != "label"}
        commit = row.record["commit"] or "–"
        short = commit[:12] + ("+" if commit.endswith("+changes") else "")
        lines.append([row.name, _in_words(own, "; "), short, row.record["date"][:16].replace("T", " ")])
    note = f"Same for all: {_in_words(shared, '; ')}." if shared else ""
    return Part("What ran", table=Table(["model", "configuration", "commit", "date (UTC)"], lines, note, texts=4))


def _shared(found: list[Row]) -> dict[str, Any]:
    """The part of the configuration that all models were measured with."""
    first = _config(found[0])
    return {name: value for name, value in first.items() if all(_config(row).get(name) == value for row in found)}


def _config(row: Row) -> dict[str, Any]:
    return row.record["config"] | {f"seed of {name}": seed for name, seed in row.record["seeds"].items()}


def _in_words(value: Any, separator: str = ", ") -> str:
    """A configuration as text; lists that nobody would read by their length."""
    if isinstance(value, dict):
        return separator.join(f"{name} {_in_words(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return f"[{', '.join(map(_in_words, value))}]" if len(value) <= 8 else f"[{len(value)} entries]"
    return str(value)
