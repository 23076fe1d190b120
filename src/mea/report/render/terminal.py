"""Small records as tables for the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mea.records import Record
from mea.report.sections.comparison_rows import with_error


def perplexity_table(record: Record) -> Table:
    """A record of the kind ``"perplexity"``: one line per model.

    Raises
    ------
    ValueError
        The record is of another kind.
    """
    if record["kind"] != "perplexity":
        raise ValueError(f"a record of the kind {record['kind']!r} holds no perplexity of one text")
    config, results = record["config"], record["results"]
    table = Table(box=SIMPLE_HEAD, caption_justify="left")
    table.caption = f"{results['scored_tokens']:,} tokens scored in windows of {config['window']:,}; ± standard error"
    columns = ["model", f"perplexity on {config['text']}", *(["ratio"] if config.get("against") else [])]
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    line = [config["model"], with_error(results["perplexity"], results["standard_error"])]
    if config.get("against"):
        line.append(with_error(results["ratio"], results["ratio_standard_error"]))
    table.add_row(*line)
    if config.get("against"):
        other = with_error(results["against_perplexity"], results["against_standard_error"])
        table.add_row(config["against"], other, "1")
    return table


def plan_table(preview: dict[str, Any]) -> Table:
    """What a compression will do and cost, from `mea.compression.preview`."""
    table = Table(box=SIMPLE_HEAD, show_header=False, title=f"Compressing {preview['model']}", title_justify="left")
    before, after = preview["bytes_per_token_before"], preview["bytes_per_token"]
    context = preview["context"]
    full = f"{_size(preview['bytes_at_context_before'])} → {_size(preview['bytes_at_context'])}"
    again = (
        f", repeated spans in {share:.0%} of the windows" if (share := preview.get("calibration_copy_fraction")) else ""
    )
    for line in (
        ("method", preview["method"]),
        ("ranks (keys, values)", _ranges(preview["ranks"])),
        *([("to begin with", "ranks are chosen layer by layer")] if preview.get("allocation") else []),
        ("cache per token", f"{before:,} → {after:,} bytes ({after / before:.1%}), {preview['dtype']}"),
        (f"cache at {context:,} tokens", full),
        ("calibration", f"{preview['calibration_tokens']:,} tokens of {preview['calibration_text']}{again}"),
        *([("refinement", f"{preview['refinement']['passes']} passes")] if preview.get("refinement") else []),
        ("memory beyond the weights", f"about {_size(preview['memory'])}"),
        ("time for the fit", f"about {preview['seconds'] / 60:.1f} min on this machine"),
    ):
        table.add_row(*line)
    return table


def compression_table(record: Record, out: str) -> Table:
    """What a compression came to, from the record that it leaves."""
    config, results = record["config"], record["results"]
    table = Table(box=SIMPLE_HEAD, title=f"Saved to {out}", title_justify="left")
    for index, column in enumerate(("measured", config["model"], "compressed", "ratio")):
        table.add_column(column, justify="right" if index else "left")
    before, after = results["cache_bytes_per_token_before"], results["cache_bytes_per_token"]
    table.add_row("cache bytes per token", f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.3f}")
    if "perplexity" in results:
        table.add_row(
            f"perplexity, {config['measured_text']}, {config['measured_tokens']:,} tokens",
            f"{results['perplexity_before']:.2f}",
            f"{results['perplexity']:.2f}",
            with_error(results["perplexity_ratio"], results["perplexity_ratio_error"]),
        )
    errors = results["self_check"]
    table.caption = (
        f"Checked in fp32: at full rank the logits are the original's to {errors['full_rank']:.0e}, cached decoding is "
        f"the pass at once to {errors['cached']:.0e}. ± is one standard error."
    )
    table.caption_justify = "left"
    return table


def _ranges(ranks: list[list[int] | None]) -> str:
    """``layers 0-2: as they are; 3-29: 96, 96``."""
    runs: list[tuple[int, int, list[int] | None]] = []
    for layer, pair in enumerate(ranks):
        if runs and runs[-1][2] == pair:
            runs[-1] = (runs[-1][0], layer, pair)
        else:
            runs.append((layer, layer, pair))
    named = [f"{a}-{b}: {'as they are' if pair is None else f'{pair[0]}, {pair[1]}'}" for a, b, pair in runs]
    return "layers " + "; ".join(named[:6]) + (f"; … ({len(runs)} runs)" if len(named) > 6 else "")


def _size(count: float | int) -> str:
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count:.1f} {unit}" if power else f"{count:.0f} B"
