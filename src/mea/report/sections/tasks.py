"""Tasks: scores beside the paper's published rows, and two models compared item by item.

Kinds of records, as `mea.evaluate.harness.run` makes them: ``"task"`` has ``config.label``, ``task``, ``suite``,
``parameters``, ``dtype`` and ``limit``, and ``results.metrics`` with ``mean`` and ``standard_error``; ``"paired
tasks"`` has ``config.first`` and ``second``, ``results.tasks`` (task -> metric -> difference) and ``results.average``.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from rich.console import Group

from mea.evaluate.suites import SUITES
from mea.records import Record
from mea.report.parts import ABSENT, Part, Section, Table, terminal, with_interval
from mea.report.sections.published import PAPER, PUBLISHED_1, PUBLISHED_2, SCALE_1, SCALE_2, TABLE_1, TABLE_2
from mea.report.sources import reference_first

TASK, PAIRED = "task", "paired tasks"  # kinds of records


def sections(records: Sequence[Record]) -> list[Section]:
    """One section: the paper's tables with our rows where there are some, all scores, and all comparisons."""
    found = reference_first(records, TASK, PAIRED)
    parts = [part for part in (table_1(found), table_2(found)) if part]
    parts += [scores(found)] if found else []
    parts += [differences(record) for record in records if record["kind"] == PAIRED]
    return [Section("Tasks", parts)]


def task_tables(records: Sequence[Record]) -> list[Group]:
    """Tables for a terminal: scores of each model, then the comparisons."""
    found = reference_first(records, TASK, PAIRED)
    parts = [scores(found)] if found else []
    return [terminal(part) for part in [*parts, *(differences(one) for one in records if one["kind"] == PAIRED)]]


def table_1(records: Sequence[Record]) -> Part | None:
    """The paper's Table 1 with our models below it; None if none of its tasks was run.

    Every row says the model and its scale: the paper's are of another size and training than ours.
    """
    found = [record for record in records if record["config"]["task"] in TABLE_1.values()]
    if not found:
        return None
    lines = [[f"{name}, published", SCALE_1, *(f"{x:.2f}" for x in row)] for name, row in PUBLISHED_1.items()]
    published = len(lines)
    for label, own in _by_label(found).items():
        metrics = [own[task]["results"]["metrics"]["acc"] if task in own else None for task in TABLE_1.values()]
        there = [metric for metric in metrics if metric]
        average = ABSENT
        if len(there) == len(TABLE_1):
            error = sqrt(sum(metric["standard_error"] ** 2 for metric in there)) / len(there)
            average = _percent({"mean": sum(metric["mean"] for metric in there) / len(there), "standard_error": error})
        cells = [_percent(metric) if metric else ABSENT for metric in metrics]
        lines.append([label, _scale(own), *cells, average])
    note = (
        f"Accuracy in %, no examples, the likelier answer not normalised by length. The first {published} rows are "
        f"those of {PAPER}, of models of another scale; compare rows of one scale with each other only. ± is one "
        "standard error over the rows of a task."
    )
    ours = tuple(range(published, len(lines)))
    table = Table(["model", "scale", *TABLE_1, "average"], lines, note, ours, texts=2)
    return Part("The paper's Table 1 and our models", table=table)


def table_2(records: Sequence[Record]) -> Part | None:
    """The paper's Table 2 with our models' means over the tasks of each group; None if none of them was run."""
    found = [record for record in records if record["config"].get("suite") in TABLE_2]
    if not found:
        return None
    lines = [[f"{name}, published", SCALE_2, *(f"{x:.2f}" for x in row)] for name, row in PUBLISHED_2.items()]
    published = len(lines)
    for label, own in _by_label(found).items():
        line = [label, _scale(own)]
        for suite in TABLE_2:
            means = [_main(record)["mean"] for record in own.values() if record["config"]["suite"] == suite]
            tasks = f"{len(means)} task{'s' * (len(means) > 1)}"
            line.append(f"{100 * sum(means) / len(means):.2f} [{tasks}]" if means else ABSENT)
        lines.append(line)
    note = (
        f"Averages in %. The first {published} rows are those of {PAPER}, over its benchmarks; ours are over "
        "the tasks of our suites, in brackets how many: the columns are not the same measure. Of the paper's columns "
        f"we have {_columns('columns')}; not {_columns('missing')}."
    )
    table = Table(["model", "scale", *TABLE_2], lines, note, tuple(range(published, len(lines))), texts=2)
    return Part("The paper's Table 2 and our models", table=table)


def _columns(which: str) -> str:
    """Columns of the paper's Table 2 that our suites measure, or lack."""
    return ", ".join(name for group in TABLE_2 if group in SUITES for name in getattr(SUITES[group], which))


def scores(records: Sequence[Record]) -> Part:
    """Every score."""
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
        for metric, found in metrics.items():
            counts = [ABSENT if found[key] is None else str(found[key]) for key in ("only_first", "only_second")]
            value = ABSENT if found["p_value"] is None else f"{found['p_value']:.2g}"
            needed = f"{found['items_for_a_point']:,}"
            lines.append([task, metric, f"{found['items']:,}", _gap(found), " / ".join(counts), value, needed])
    mean = record["results"]["average"]
    lines.append(["average", "main", "", _gap(mean), "", "", ""])
    header = ["task", "metric", "items", "difference", "only first / second", "McNemar's p", "items for 1 point"]
    note = (
        f"Score of {config['first']} less that of {config['second']} in percentage points, with 95 % intervals from "
        "resampled items; items that only one got right; items at which one point would show in 80 % of evaluations."
    )
    heading = f"{config['first']} against {config['second']}"
    return Part(heading, table=Table(header, lines, note, best=(len(lines) - 1,), texts=2))


def _by_label(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Label -> task -> record."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        found.setdefault(record["config"]["label"], {})[record["config"]["task"]] = record
    return found


def _scale(own: dict[str, Record]) -> str:
    config = next(iter(own.values()))["config"]
    rows = f", first {config['limit']} rows" if config["limit"] else ""
    kinds = " and ".join(sorted({record["config"]["dtype"] for record in own.values()}))
    return f"{config['parameters'] / 1e6:,.0f}M, {kinds}{rows}"


def _main(record: Record) -> dict[str, float]:
    return record["results"]["metrics"][record["results"]["main"]]


def _gap(found: dict[str, Any]) -> str:
    return with_interval(100 * found["difference"], [100 * end for end in found["interval"]], 2, "+")


def _percent(metric: dict[str, float]) -> str:
    return f"{100 * metric['mean']:.2f} ± {100 * metric['standard_error']:.2f}"
