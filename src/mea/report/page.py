"""One HTML page that shows records: no script, nothing loaded from elsewhere, readable on paper and on a phone."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mea.records import Record
from mea.report import figures
from mea.report.rows import Row, cells, footnote, header, rows, texts_of


def write_report(
    records: Sequence[Record], path: str | Path, *, title: str = "", regenerate: str = "make demo"
) -> Path:
    """Write the page of a comparison.

    Parameters
    ----------
    records
        As `mea.records.read_records` gives them; those of other kinds are left out.
    path
        The HTML file to write.
    title
        Heading; by default it names the models.
    regenerate
        The command that made the records, for the reader who wants them anew.

    Raises
    ------
    ValueError
        No record is of the kind ``"comparison"``.
    ImportError
        matplotlib or jinja2 is not installed.
    """
    text = render(records, title=title, regenerate=regenerate)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(records: Sequence[Record], *, title: str = "", regenerate: str = "make demo") -> str:
    """The page as text; see `write_report`."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the report needs {' and '.join(missing)}: pip install 'mea[report]'")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = rows(records)
    models, shared = list(dict.fromkeys(row.model for row in found)), _shared(found)
    environment = Environment(loader=PackageLoader("mea.report"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html").render(
        title=title or f"Half the KV cache of {', '.join(models)}" if _halved(found) else title or ", ".join(models),
        sections=[_section(model, [row for row in found if row.model == model]) for model in models],
        machines=_distinct(_machine(row.record) for row in found),
        versions=_distinct(row.record["versions"] for row in found),
        settings=_in_words(shared, "; "),
        runs=[_run(row, shared) for row in found],
        regenerate=regenerate,
    )


def _section(model: str, found: list[Row]) -> dict[str, Any]:
    compressed = [row for row in found if row.compressed]
    best = min(compressed, key=lambda row: row.main_ratio, default=None)
    texts = texts_of(found)
    return {
        "model": model,
        "summary": _summary(found[0], best, texts),
        "header": header(found),
        "lines": [(row.compressed and row is best, cells(row, texts)) for row in found],
        "footnote": footnote(found),
        "bytes": figures.perplexity_against_bytes(found),
        "positions": figures.ratio_by_position(found),
        "positions_text": next((row.results["position_text"] for row in found if "position_text" in row.results), ""),
        "layers": figures.loss_by_layer(found),
        "continuations": [(row.name, row.results["continuation"]) for row in found if row.results.get("continuation")],
    }


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
    return all(abs(row.record["config"].get("keep", 0) - 0.5) < 0.01 for row in found if row.compressed)


def _machine(record: Record) -> dict[str, str]:
    machine = record["machine"]
    memory = machine.get("memory_bytes")
    shown = {
        "processor": machine.get("processor"),
        "architecture": machine.get("architecture"),
        "system": machine.get("system"),
        "cores": machine.get("cores"),
        "memory": f"{memory / 2**30:.0f} GiB" if memory else None,
        "threads of torch": machine.get("torch_threads"),
        "accelerator": machine.get("accelerator") or "none",
    }
    return {name: str(value) for name, value in shown.items() if value is not None}


def _shared(found: list[Row]) -> dict[str, Any]:
    """The part of the configuration that all models were measured with."""
    first = _config(found[0])
    return {name: value for name, value in first.items() if all(_config(row).get(name) == value for row in found)}


def _config(row: Row) -> dict[str, Any]:
    return row.record["config"] | {f"seed of {name}": seed for name, seed in row.record["seeds"].items()}


def _run(row: Row, shared: dict[str, Any]) -> dict[str, Any]:
    """What ran, for the last table: every choice that is not the same for all."""
    own = {name: value for name, value in _config(row).items() if name not in shared and name != "label"}
    commit = row.record["commit"] or "–"
    return {
        "name": row.name,
        "config": _in_words(own, "; "),
        "commit": commit[:12] + ("+" if commit.endswith("+changes") else ""),
        "date": row.record["date"][:16].replace("T", " "),
    }


def _in_words(value: Any, separator: str = ", ") -> str:
    """A configuration as text; lists that nobody would read by their length."""
    if isinstance(value, dict):
        return separator.join(f"{name} {_in_words(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return f"[{', '.join(map(_in_words, value))}]" if len(value) <= 8 else f"[{len(value)} entries]"
    return str(value)


def _distinct(items: Any) -> list[dict[str, str]]:
    return [dict(pairs) for pairs in dict.fromkeys(tuple(item.items()) for item in items)]
