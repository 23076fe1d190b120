"""Compression methods as the rows of a table, from records of the kind ``"comparison"``.

Fields of a record of the kind ``"comparison"``; all results but the first may be missing and are then shown as absent:

- ``config``: ``model``, ``method`` (``"none"`` for the uncompressed model), ``keep`` (fraction of the cache's bytes),
  ``label`` if the method's name does not say which variant it is; ``series`` if the label says the size;
- ``results.texts``: text -> ``perplexity``, ``standard_error``, ``ratio``, ``ratio_standard_error``, ``window``,
  ``tokens``; the first text is the main one;
- ``results.positions``: list of ``start``, ``stop``, ``perplexity``, ``standard_error``, ``ratio``,
  ``ratio_standard_error``; ``results.position_text`` names the text;
- ``results.cache``: ``bytes_per_token``, ``tokens``, measured on a real cache;
- ``results.decode``: ``context``, ``dtype``, ``batch``, ``seconds`` (median of a step), ``ratio`` to the uncompressed
  model in the same run, with its quartiles ``ratio_low`` and ``ratio_high``; ``samples.decode_seconds`` may hold the
  samples by name, those of ``"uncompressed"`` among them;
- ``results.compress_seconds``;
- ``results.continuations``: as ``results.texts``, with ``context``: the first ``context`` tokens of a window fill the
  cache, only the tokens after them are scored;
- ``results.not_run``: why there is nothing else;
- ``results.layers``: ``what`` (the label of the axis) and ``values``, one per layer;
- ``results.continuation``: ``prompt`` and ``text``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mea.records import Record
from mea.report.formatting import ABSENT, with_error
from mea.report.parts import Part, Table
from mea.report.render.terminal import TerminalTable

KIND = "comparison"
UNCOMPRESSED = "none"


@dataclass(frozen=True)
class Row:
    """One measured model: its name in tables and legends, and its results."""

    name: str
    series: str  # shared by measurements of one method at several cache sizes
    model: str
    compressed: bool
    results: dict[str, Any]
    record: Record

    def measured(self, kind: str) -> dict[str, Any]:
        """Results of a kind such as ``"texts"``, empty where there are none."""
        return self.results.get(kind) or {}

    @property
    def main_score(self) -> dict[str, Any]:
        """Results on the first text."""
        return next(iter((self.measured("texts") or self.measured("continuations")).values()), {})

    @property
    def main_ratio(self) -> float | int:
        """Ratio on the first text; infinite if it was not measured, one for the uncompressed model."""
        return (self.main_score.get("ratio") or math.inf) if self.compressed else 1.0

    @property
    def bytes_per_token(self) -> float | int | None:
        """Measured size of the cache."""
        return self.measured("cache").get("bytes_per_token")


def rows(records: Sequence[Record]) -> list[Row]:
    """The uncompressed model first, then methods by their ratio on the first text, lowest first.

    Where there are several cache sizes, names give the size; where a name repeats, the seeds that differ, or a number.

    Raises
    ------
    ValueError
        There is no record of the kind ``"comparison"``.
    """
    chosen = [record for record in records if record["kind"] == KIND]
    if not chosen:
        kinds = sorted({record["kind"] for record in records})
        raise ValueError(f"no record of the kind {KIND!r} among {len(records)} ({', '.join(kinds) or 'none'})")
    sizes = {r["config"].get("keep") for r in chosen if r["config"].get("method") != UNCOMPRESSED}
    methods = [_row(record, len(sizes)) for record in chosen]
    methods = [_with_decode(row, methods) for row in _told_apart(methods)]
    return sorted(methods, key=lambda row: (row.model, row.compressed, row.main_ratio, row.name))


def texts_of(methods: Sequence[Row], kind: str = "texts") -> list[str]:
    """Names of the texts that perplexity (or, of the kind ``"continuations"``, its ratio) was measured on."""
    return list(dict.fromkeys(text for row in methods for text in row.measured(kind)))


def cells(methods: Sequence[Row], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the table's lines; columns of which nothing was measured are left out.

    The brief form, for the terminal, shows the error of the first ratio of each kind only.
    """
    texts = {kind: texts_of(methods, kind) for kind in ("texts", "continuations")}
    titles, lines = _titles(texts, brief), [_cells(row, texts, brief) for row in methods]
    measured = [i for i in range(len(titles)) if not i or any(line[i] != ABSENT for line in lines)]
    return [titles[i] for i in measured], [[line[i] for i in measured] for line in lines]


def _titles(texts: dict[str, list[str]], brief: bool) -> list[str]:
    columns = ["method"]
    for text in texts["texts"]:
        columns += [f"{text.split('-')[0]}\nppl" if brief else f"{text} perplexity", "ratio"]
    for text in texts["continuations"]:
        columns.append(f"{text.split('-')[0]}\ncont." if brief else f"{text} continued, ratio")
    if brief:
        return [*columns, "bytes/\ntoken", "ms/\ntoken", "time\nratio", "made\nin"]
    return [*columns, "cache bytes per token", "decode ms per token", "time ratio", "compressed in"]


def _cells(row: Row, texts: dict[str, list[str]], brief: bool) -> list[str]:
    """One line of the table; errors are one standard error, ranges are quartiles."""
    line = [row.name]
    for kind, names in texts.items():
        for index, text in enumerate(names):
            values = row.measured(kind).get(text, {})
            if kind == "texts":
                line.append(with_error(values.get("perplexity"), None if brief else values.get("standard_error")))
            error = None if brief and index else values.get("ratio_standard_error")
            line.append(_ratio(values.get("ratio"), error, brief) if row.compressed else "1")
    size = row.bytes_per_token
    line.append(ABSENT if size is None else f"{size:,.0f}")
    decode = row.measured("decode")
    line.append(_milliseconds(row, decode, brief))
    line.append(_time_ratio(row, decode, brief))
    seconds = row.results.get("compress_seconds")
    return [*line, ABSENT if seconds is None or not row.compressed else f"{seconds:.0f} s"]


def terminal_table(records: Sequence[Record]) -> TerminalTable:
    """The table of methods for a terminal; methods with the lowest ratio are bold.

    Raises
    ------
    ValueError
        As `rows`.
    """
    methods = rows(records)
    best = {row.name for row in lowest(methods)}
    bold = tuple(index for index, row in enumerate(methods) if row.compressed and row.name in best)
    heading = "KV cache of " + ", ".join(dict.fromkeys(row.model for row in methods))
    return TerminalTable(Part(heading, table=Table(*cells(methods, brief=True), footnote(methods), bold)))


def lowest(methods: Sequence[Row]) -> list[Row]:
    """The compressed model with the lowest ratio, and those within two standard errors of the difference from it.

    Ratios of whole windows and of continuations are not compared: where there are some of both, the former count.
    """
    scored = [row for row in methods if row.compressed and row.main_ratio < math.inf]
    scored = [row for row in scored if row.measured("texts")] or scored
    best = min(scored, key=lambda row: row.main_ratio, default=None)
    if best is None:
        return []

    def ties(row: Row) -> bool:
        errors = (one.main_score.get("ratio_standard_error") or 0.0 for one in (row, best))
        return row.main_ratio - best.main_ratio <= 2 * math.hypot(*errors)

    return [best, *(row for row in scored if row is not best and ties(row))]


def footnote(methods: Sequence[Row]) -> str:
    """What the numbers of the table mean."""
    notes = ["± is one standard error; ratios are to the uncompressed model, token by token on the same text"]
    for kind, describe in (("texts", _windows), ("continuations", _continuations)):
        for text in texts_of(methods, kind):
            values = next(row.measured(kind)[text] for row in methods if text in row.measured(kind))
            notes += [note for note in [describe(text, values)] if note]
    absent = [f"{row.name} ({row.results['not_run']})" for row in methods if "not_run" in row.results]
    if absent:
        notes.append(f"Not run: {'; '.join(absent)}")
    decode = next((row.measured("decode") for row in methods if row.measured("decode")), {})
    if "context" in decode:
        how = ", ".join(filter(None, [decode.get("dtype"), f"batch {decode['batch']}" if "batch" in decode else ""]))
        how = f" ({how})" if how else ""
        what = "medians, beside the uncompressed model's in the same run; a range is that of the quartiles"
        notes.append(f"Decoding after {decode['context']:,} tokens{how}: {what}")
    return f"{notes[0]}. " + " ".join(f"{note}." for note in notes[1:])


def _windows(text: str, values: dict[str, Any]) -> str:
    if not {"tokens", "window"} <= values.keys():
        return ""
    return f"{text}: {values['tokens']:,} tokens scored in windows of {values['window']:,}"


def _continuations(text: str, values: dict[str, Any]) -> str:
    if not {"tokens", "context"} <= values.keys():
        return ""
    return f"{text} continued: {values['tokens']:,} tokens scored after {values['context']:,} tokens in the cache"


def _row(record: Record, sizes: int) -> Row:
    config = record["config"]
    method, keep = str(config.get("method", "?")), config.get("keep")
    compressed = method != UNCOMPRESSED
    series = str(config.get("label") or (method if compressed else "uncompressed"))
    name = f"{series}, {100 * keep:.3g} %" if compressed and keep and keep < 1 and sizes > 1 else series
    if config.get("series"):  # the label says the size
        series, name = config["series"], series
    return Row(name, series, str(config.get("model", "?")), compressed, record["results"], record)


def _told_apart(methods: Sequence[Row]) -> list[Row]:
    """Rows with names of their own: figures find a row's values by its name."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in methods:
        groups.setdefault((row.model, row.name), []).append(row)
    apart = []
    for (_, name), group in groups.items():
        seeds = [tuple(row.record["seeds"].items()) for row in group]
        differ = len(set(seeds)) == len(group)
        notes = [", ".join(f"seed of {what} {seed}" for what, seed in pairs) for pairs in seeds]
        for index, (row, note) in enumerate(zip(group, notes, strict=True)):
            apart.append(row if len(group) == 1 else replace(row, name=f"{name}, {note if differ else index + 1}"))
    return apart


def _with_decode(row: Row, methods: Sequence[Row]) -> Row:
    """The uncompressed model is timed in the runs of the others: its time is the median over all of them."""
    if row.compressed or row.measured("decode"):
        return row
    others = [other for other in methods if other.compressed and other.model == row.model and other.measured("decode")]
    samples = [other.record["samples"].get("decode_seconds") for other in others]
    seconds = [x for by_name in samples if isinstance(by_name, dict) for x in by_name.get("uncompressed", [])]
    if not seconds:
        return row
    return replace(row, results=row.results | {"decode": others[0].results["decode"] | {"seconds": median(seconds)}})


def _ratio(value: float | int | None, error: float | int | None, brief: bool) -> str:
    text = with_error(value, error)
    return text.replace(" ", "") if brief else text


def _milliseconds(row: Row, decode: dict[str, Any], brief: bool) -> str:
    """Time per token, and the uncompressed model's in the same run: a machine is not equally fast in all runs."""
    if decode.get("seconds") is None:
        return ABSENT
    samples = row.record["samples"].get("decode_seconds")
    beside = samples.get("uncompressed") if isinstance(samples, dict) else None
    text = f"{1e3 * decode['seconds']:.1f}"
    return f"{text} (beside {1e3 * median(beside):.1f})" if beside and row.compressed and not brief else text


def _time_ratio(row: Row, decode: dict[str, Any], brief: bool) -> str:
    if not row.compressed:
        return "1" if decode else ABSENT
    if decode.get("ratio") is None:
        return ABSENT
    text = f"{decode['ratio']:.2f}"
    return (
        text
        if brief or not {"ratio_low", "ratio_high"} <= decode.keys()
        else f"{text} ({decode['ratio_low']:.2f}-{decode['ratio_high']:.2f})"
    )
