"""Scores on tasks beside the paper's published rows, and two models compared item by item.

Kinds of records, as `mea.evaluate.harness.run` makes them: ``"task"`` has ``config.label``, ``task``, ``suite``,
``parameters``, ``dtype`` and ``limit``, and ``results.metrics`` with ``mean`` and ``standard_error``; ``"paired
tasks"`` has ``config.first`` and ``second``, ``results.tasks`` (task -> metric -> difference) and ``results.average``.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from mea.records import Record
from mea.report.formatting import ABSENT, with_interval
from mea.report.parts import Part, Section, Table
from mea.report.render.terminal import TerminalTable
from mea.report.sections.published import PAPER, PUBLISHED_1, PUBLISHED_2, SCALE_1, SCALE_2, TABLE_1, TABLE_2
from mea.report.sources import reference_first

TASK, PAIRED = "task", "paired tasks"  # kinds of records


def sections(records: Sequence[Record]) -> list[Section]:
    """One section: the paper's tables with our rows where measured are some, all scores, and all comparisons."""
    measured = reference_first(records, TASK, PAIRED)
    published = [part for part in (table_1(measured), table_2(measured)) if part]
    return [Section("Tasks", [*published, *_measured(records)])]


def task_tables(records: Sequence[Record]) -> list[TerminalTable]:
    """Tables for a terminal: scores of each model, then the comparisons."""
    return [TerminalTable(part) for part in _measured(records)]


def _measured(records: Sequence[Record]) -> list[Part]:
    measured = reference_first(records, TASK, PAIRED)
    parts = [scores(measured)] if measured else []
    return [*parts, *(differences(record) for record in records if record["kind"] == PAIRED)]


def table_1(records: Sequence[Record]) -> Part | None:
    """The paper's Table 1 with our models below it; None if none of its tasks was run.

    Every row says the model and its scale: the paper's are of another size and training than ours.
    """
    records = [record for record in records if record["config"]["task"] in TABLE_1.values()]
    if not records:
        return None
    lines = [[f"{name}, published", SCALE_1, *(f"{x:.2f}" for x in row)] for name, row in PUBLISHED_1.items()]
    published = len(lines)
    for label, own in _by_label(records).items():
        metrics = [own[task]["results"]["metrics"].get("acc") if task in own else None for task in TABLE_1.values()]
        measured = [metric for metric in metrics if metric]
        average = ABSENT
        if len(measured) == len(TABLE_1):
            error = sqrt(sum((metric["standard_error"] or 0) ** 2 for metric in measured)) / len(measured)
            average = _percent(
                {"mean": sum(metric["mean"] for metric in measured) / len(measured), "standard_error": error}
            )
        cells = [_percent(metric) if metric else ABSENT for metric in metrics]
        lines.append([label, _scale(own), *cells, average])
    note = (
        f"Accuracy in %, zero-shot, answers ranked by likelihood without length normalisation. The first {published} "
        f"rows are published in {PAPER}, of models of another scale: compare rows of the same scale only. ± is one "
        "standard error over the items of a task."
    )
    ours = tuple(range(published, len(lines)))
    table = Table(["model", "scale", *TABLE_1, "average"], lines, note, ours, texts=2)
    return Part("The paper's Table 1 and our models", table=table)


def table_2(records: Sequence[Record]) -> Part | None:
    """The paper's Table 2 with our models' means over the tasks of each group; None if none of them was run."""
    records = [record for record in records if record["config"].get("suite") in TABLE_2]
    if not records:
        return None
    lines = [[f"{name}, published", SCALE_2, *(f"{x:.2f}" for x in row)] for name, row in PUBLISHED_2.items()]
    published = len(lines)
    for label, own in _by_label(records).items():
        line = [label, _scale(own)]
        for suite in TABLE_2:
            means = [_main(record)["mean"] for record in own.values() if record["config"]["suite"] == suite]
            tasks = f"{len(means)} task{'s' * (len(means) > 1)}"
            line.append(f"{100 * sum(means) / len(means):.2f} [{tasks}]" if means else ABSENT)
        lines.append(line)
    note = (
        f"Averages in %. The first {published} rows are published in {PAPER}, over its benchmarks; ours are over the "
        "tasks of our suites, whose number is in brackets, so that rows of the two kinds are not comparable. Of the "
        f"paper's columns our suites measure {_columns('columns')}; they lack {_columns('missing')}."
    )
    table = Table(["model", "scale", *TABLE_2], lines, note, tuple(range(published, len(lines))), texts=2)
    return Part("The paper's Table 2 and our models", table=table)


def _columns(which: str) -> str:
    """Columns of the paper's Table 2 that our suites measure, or lack."""
    from mea.evaluate.suites import SUITES  # the package around it imports torch

    return ", ".join(name for group in TABLE_2 if group in SUITES for name in getattr(SUITES[group], which))


def scores(records: Sequence[Record]) -> Part:
    """Every score of every model."""
    lines = []
    for record in records:
        config, results = record["config"], record["results"]
        normal = results["metrics"].get("acc_norm")
        line = [config["label"], config["task"], f"{results['items']:,}", _percent(_main(record))]
        lines.append([*line, _percent(normal) if normal else ABSENT])
    header = ["model", "task", "items", "score", "normalised by length"]
    return Part("Scores", table=Table(header, lines, "Accuracy in %; ± is one standard error.", texts=2))


def differences(record: Record) -> Part:
    """Two models item by item."""
    config, lines = record["config"], []
    for task, metrics in record["results"]["tasks"].items():
        for metric, gap in metrics.items():
            counts = [ABSENT if gap[key] is None else str(gap[key]) for key in ("only_first", "only_second")]
            p_value = ABSENT if gap["p_value"] is None else f"{gap['p_value']:.2g}"
            needed = f"{gap['items_for_a_point']:,}" if gap["items_for_a_point"] else ABSENT
            lines.append([task, metric, f"{gap['items']:,}", _gap(gap), " / ".join(counts), p_value, needed])
    mean = record["results"]["average"]
    lines.append(["average", "main", "", _gap(mean), "", "", ""])
    header = ["task", "metric", "items", "difference", "only first / second", "McNemar's p", "items for 1 point"]
    note = (
        f"Score of {config['first']} minus score of {config['second']} in percentage points, with 95 % intervals from "
        "resampled items; numbers of items that only one model got right; number of items at which 80 % of evaluations "
        "would detect a difference of one point."
    )
    heading = f"{config['first']} against {config['second']}"
    return Part(heading, table=Table(header, lines, note, best=(len(lines) - 1,), texts=2))


def _by_label(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Label -> task -> record."""
    by_label: dict[str, dict[str, Record]] = {}
    for record in records:
        by_label.setdefault(record["config"]["label"], {})[record["config"]["task"]] = record
    return by_label


def _scale(own: dict[str, Record]) -> str:
    config = next(iter(own.values()))["config"]
    rows = f", first {config['limit']} rows" if config["limit"] else ""
    kinds = " and ".join(sorted({record["config"]["dtype"] for record in own.values()}))
    return f"{config['parameters'] / 1e6:,.0f}M, {kinds}{rows}"


def _main(record: Record) -> dict[str, Any]:
    return record["results"]["metrics"][record["results"]["main"]]


def _gap(gap: dict[str, Any]) -> str:
    return with_interval(100 * gap["difference"], [100 * end for end in gap["interval"]], 2, "+")


def _percent(metric: dict[str, Any]) -> str:
    error = metric["standard_error"]
    return f"{100 * metric['mean']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
