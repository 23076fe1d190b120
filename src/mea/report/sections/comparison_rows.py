"""Records of a comparison as the rows of a table, for the page and for the terminal.

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
- ``results.continuations``: as ``results.texts``, with ``context``: of each window only what follows so many tokens is
  scored, over the cache that they left;
- ``results.not_run``: why there is nothing else;
- ``results.layers``: ``what`` (the label of the axis) and ``values``, one per layer;
- ``results.continuation``: ``prompt`` and ``text``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mea.records import Record
from mea.report.parts import ABSENT

KIND = "comparison"
UNCOMPRESSED = "none"


@dataclass(frozen=True)
class Row:
    """One measured model: its name in tables and legends, and its results."""

    name: str
    series: str  # what measurements of one method at several sizes share
    model: str
    compressed: bool
    results: dict[str, Any]
    record: Record

    @property
    def main_ratio(self) -> float:
        """Ratio on the first text; infinite if it was not measured, one for the uncompressed model."""
        texts = list((self.results.get("texts") or self.results.get("continuations") or {}).values())
        return (texts[0].get("ratio") or math.inf if texts else math.inf) if self.compressed else 1.0


def rows(records: Sequence[Record]) -> list[Row]:
    """The uncompressed model first, then methods from best to worst on the first text.

    Names tell the size where there are several.

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
    found = [_row(record, len(sizes)) for record in chosen]
    found = [_with_decode(row, found) for row in found]
    return sorted(found, key=lambda row: (row.model, row.compressed, row.main_ratio, row.name))


def texts_of(found: Sequence[Row]) -> list[str]:
    """Names of the texts that perplexity was measured on, the main one first."""
    return list(dict.fromkeys(text for row in found for text in row.results.get("texts", {})))


def cells(found: Sequence[Row], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns, and the table's lines; columns of which nothing was measured are left out.

    The brief form, for 80 columns, leaves out all errors but that of the main ratio.
    """
    titles, lines = _titles(found, brief), [_cells(row, texts_of(found), _continued(found), brief) for row in found]
    there = [i for i in range(len(titles)) if not i or any(line[i] != ABSENT for line in lines)]
    return [titles[i] for i in there], [[line[i] for i in there] for line in lines]


def _titles(found: Sequence[Row], brief: bool) -> list[str]:
    columns = ["method"]
    for text in texts_of(found):
        columns += [f"{text.split('-')[0]}\nppl" if brief else f"{text} perplexity", "ratio"]
    columns += [f"{text.split('-')[0]}\ncont." if brief else f"{text} continued, ratio" for text in _continued(found)]
    if brief:
        return [*columns, "bytes/\ntoken", "ms/\ntoken", "time\nratio", "made\nin"]
    return [*columns, "cache bytes per token", "decode ms per token", "time ratio", "compressed in"]


def _continued(found: Sequence[Row]) -> list[str]:
    """Names of the texts of which continuations were scored."""
    return list(dict.fromkeys(text for row in found for text in row.results.get("continuations", {})))


def _cells(row: Row, texts: Sequence[str], continuations: Sequence[str], brief: bool) -> list[str]:
    """One line of the table; errors are one standard error, ranges are quartiles."""
    line = [row.name]
    for index, text in enumerate(texts):
        values = row.results.get("texts", {}).get(text, {})
        line.append(with_error(values.get("perplexity"), None if brief else values.get("standard_error")))
        error = None if brief and index else values.get("ratio_standard_error")
        line.append(_ratio(values.get("ratio"), error, brief) if row.compressed else "1")
    for text in continuations:
        values = row.results.get("continuations", {}).get(text, {})
        line.append(_ratio(values.get("ratio"), values.get("ratio_standard_error"), brief) if row.compressed else "1")
    size = row.results.get("cache", {}).get("bytes_per_token")
    line.append(ABSENT if size is None else f"{size:,.0f}")
    decode = row.results.get("decode", {})
    line.append(_milliseconds(row, decode, brief))
    line.append(_time_ratio(row, decode, brief))
    seconds = row.results.get("compress_seconds")
    return [*line, ABSENT if seconds is None or not row.compressed else f"{seconds:.0f} s"]


def with_error(value: float | int | None, error: float | int | None) -> str:
    """A value to the digits that its error leaves meaningful: ``1.53 ± 0.02``, ``1,106 ± 13``."""
    if value is None:
        return ABSENT
    if not error:
        return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    digits = 0 if error >= 10 else 1 if error >= 0.3 else 2 if error >= 0.005 else 3
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def terminal_table(records: Sequence[Record]) -> Table:
    """The table of methods for a terminal.

    Raises
    ------
    ValueError
        As `rows`.
    """
    found = rows(records)
    titles, lines = cells(found, brief=True)
    table = Table(title=_title(found), caption=footnote(found), caption_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 0), False
    for index, title in enumerate(titles):  # only names of methods are wrapped
        table.add_column(title, justify="right" if index else "left", no_wrap=index > 0)
    best = min((row.main_ratio for row in found if row.compressed), default=None)
    for row, line in zip(found, lines, strict=True):
        style = "bold" if row.compressed and row.main_ratio == best else ""
        table.add_row(*map(Text, line), style=style, end_section=not row.compressed)
    return table


def footnote(found: Sequence[Row]) -> str:
    """What the numbers of the table mean."""
    notes = ["± is one standard error; ratios are to the uncompressed model, token by token on the same text"]
    for text in texts_of(found):
        values = next(row.results["texts"][text] for row in found if text in row.results.get("texts", {}))
        if "tokens" in values and "window" in values:
            notes.append(f"{text}: {values['tokens']:,} tokens scored in windows of {values['window']:,}")
    for text in _continued(found):
        values = next(r.results["continuations"][text] for r in found if text in r.results.get("continuations", {}))
        what = f"{values['tokens']:,} tokens, each window's after {values['context']:,} that are in the cache"
        notes.append(f"{text} continued: {what}")
    absent = [f"{row.name} ({row.results['not_run']})" for row in found if "not_run" in row.results]
    if absent:
        notes.append(f"Not run: {'; '.join(absent)}")
    decode = next((row.results["decode"] for row in found if row.results.get("decode")), {})
    if "context" in decode:
        how = ", ".join(filter(None, [decode.get("dtype"), f"batch {decode['batch']}" if "batch" in decode else ""]))
        how = f" ({how})" if how else ""
        what = "medians, beside the uncompressed model's in the same run; a range is that of the quartiles"
        notes.append(f"Decoding after {decode['context']:,} tokens{how}: {what}")
    return f"{notes[0]}. " + " ".join(f"{note}." for note in notes[1:])


def _row(record: Record, sizes: int) -> Row:
    config = record["config"]
    method, keep = str(config.get("method", "?")), config.get("keep")
    compressed = method != UNCOMPRESSED
    series = str(config.get("label") or (method if compressed else "uncompressed"))
    name = f"{series}, {100 * keep:.3g} %" if compressed and keep and sizes > 1 else series
    if config.get("series"):  # the label says the size
        series, name = config["series"], series
    return Row(name, series, str(config.get("model", "?")), compressed, record["results"], record)


def _with_decode(row: Row, found: Sequence[Row]) -> Row:
    """The uncompressed model decodes in the runs of the others: its time is the median over all of them."""
    if row.compressed or row.results.get("decode"):
        return row
    others = [other for other in found if other.compressed and other.model == row.model and other.results.get("decode")]
    samples = [other.record["samples"].get("decode_seconds") for other in others]
    seconds = [x for by_name in samples if isinstance(by_name, dict) for x in by_name.get("uncompressed", [])]
    if not seconds:
        return row
    return replace(row, results=row.results | {"decode": others[0].results["decode"] | {"seconds": median(seconds)}})


def _ratio(value: float | int | None, error: float | int | None, brief: bool) -> str:
    text = with_error(value, error)
    return text.replace(" ", "") if brief else text


def _milliseconds(row: Row, decode: dict[str, Any], brief: bool) -> str:
    """Of a token, and of the uncompressed model's in the same run: a machine is not equally fast in all runs."""
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
        text if brief or "ratio_low" not in decode else f"{text} ({decode['ratio_low']:.2f}-{decode['ratio_high']:.2f})"
    )


def _title(found: Sequence[Row]) -> str:
    return "KV cache of " + ", ".join(dict.fromkeys(row.model for row in found))
