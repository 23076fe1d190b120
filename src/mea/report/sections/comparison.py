"""Compression methods compared: the section about records of the kind ``"comparison"``."""

from collections.abc import Sequence
from typing import Any

from mea.records import Record
from mea.report.parts import Part, Section, Table
from mea.report.sections import comparison_figures
from mea.report.sections.comparison_rows import Row, cells, footnote, lowest, rows, texts_of


def sections(records: Sequence[Record]) -> list[Section]:
    """One section for every model."""
    methods = rows(records)
    shared = _shared(methods)
    models = dict.fromkeys(row.model for row in methods)
    heading = "Half the KV cache of " if _halved(methods) else "A smaller KV cache for "
    return [
        Section(heading + model, _parts([row for row in methods if row.model == model], shared)) for model in models
    ]


def _parts(methods: list[Row], shared: dict[str, Any]) -> list[Part]:
    best = lowest(methods)
    highlighted = tuple(index for index, row in enumerate(methods) if row in best)
    parts = [Part(numbers=_summary(methods[0], best, texts_of(methods)))]
    parts.append(Part("Methods side by side", table=Table(*cells(methods), footnote(methods), highlighted)))
    if figures := comparison_figures.figures(methods):
        parts.append(Part("Perplexity by cache size, position and layer", figures=figures))
    continued = [(row.name, row.results["continuation"]) for row in methods if row.results.get("continuation")]
    if continued:
        quotes = [(name, continuation["text"].strip()) for name, continuation in continued]
        parts.append(
            Part(
                "The same prompt, continued",
                f"{continued[0][1]['prompt']} … (marked: the first word that differs from {continued[0][0]})",
                quotes=quotes,
            )
        )
    return [*parts, _what_ran(methods, shared)]


def _summary(plain: Row, best: list[Row], texts: list[str]) -> list[tuple[str, str]]:
    """Cache, perplexity and time of the method with the lowest ratio; of several that tie, only their names."""
    if not best or plain.compressed:
        return []
    first, *tied = best
    if tied:
        names = ", ".join(row.name for row in best)
        meaning = f"share the lowest perplexity ratio, {first.main_ratio:.3f}, within two standard errors: {names}"
        return [(f"{len(best)} methods", meaning)]
    numbers = []
    sizes = [row.bytes_per_token for row in (plain, first)]
    if sizes[0] and sizes[1]:
        numbers.append((f"{100 * sizes[1] / sizes[0]:.3g} %", f"of the cache: {sizes[1]:,.0f} bytes per token"))
    if texts:
        numbers.append((f"× {first.main_ratio:.2f}", f"perplexity on {texts[0]}"))
    decode = first.measured("decode")
    if decode.get("ratio"):
        after = f" after {decode['context']:,} tokens" if decode.get("context") else ""
        numbers.append((f"× {decode['ratio']:.2f}", f"time per token{after}"))
    return [*numbers, (first.name, "the lowest perplexity of the methods compared")] if numbers else []


def _halved(methods: list[Row]) -> bool:
    return all(abs((row.record["config"].get("keep") or 0) - 0.5) < 0.01 for row in methods if row.compressed)


def _what_ran(methods: list[Row], shared: dict[str, Any]) -> Part:
    """The choices that differ between models, as a table; the shared ones below it."""
    lines = []
    for row in methods:
        own = {name: value for name, value in _config(row).items() if name not in shared and name != "label"}
        commit = row.record["commit"] or "–"
        short = commit[:12] + ("+" if commit.endswith("+changes") else "")
        lines.append([row.name, _in_words(own, "; "), short, row.record["date"][:16].replace("T", " ")])
    note = f"Same for all: {_in_words(shared, '; ')}." if shared else ""
    return Part("What ran", table=Table(["model", "configuration", "commit", "date (UTC)"], lines, note, texts=4))


def _shared(methods: list[Row]) -> dict[str, Any]:
    """The part of the configuration that all models were measured with."""
    first = _config(methods[0])
    return {name: value for name, value in first.items() if all(_config(row).get(name) == value for row in methods)}


def _config(row: Row) -> dict[str, Any]:
    return row.record["config"] | {f"seed of {name}": seed for name, seed in row.record["seeds"].items()}


def _in_words(value: Any, separator: str = ", ") -> str:
    """A configuration as text; of a list with more than 8 entries only their number."""
    if isinstance(value, dict):
        return separator.join(f"{name} {_in_words(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return f"[{', '.join(map(_in_words, value))}]" if len(value) <= 8 else f"[{len(value)} entries]"
    return str(value)
