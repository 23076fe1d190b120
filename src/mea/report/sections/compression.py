"""A compression before and after it ran, and the perplexity of one text, as tables for the terminal."""

from typing import Any

from mea.names import size
from mea.records import Record, mean_bits
from mea.report.formatting import with_error
from mea.report.parts import Part, Table
from mea.report.render.terminal import TerminalTable

READINGS = {
    "predictive": "predictive: read without rebuilding keys",
    "joint": "joint: smallest error, keys rebuilt at every reading",
}


def perplexity_table(record: Record) -> TerminalTable:
    """A record of the kind ``"perplexity"``: one line per model.

    Raises
    ------
    ValueError
        The record is of another kind.
    """
    if record["kind"] != "perplexity":
        raise ValueError(f"a record of the kind {record['kind']!r} holds no perplexity of one text")
    config, results = record["config"], record["results"]
    note = f"{results['scored_tokens']:,} tokens scored in windows of {config['window']:,}; ± standard error"
    header = ["model", f"perplexity on {config['text']}"]
    lines = [[config["model"], with_error(results["perplexity"], results["standard_error"])]]
    if config.get("against"):
        header.append("ratio")
        lines[0].append(with_error(results["ratio"], results["ratio_standard_error"]))
        other = with_error(results["against_perplexity"], results["against_standard_error"])
        lines.append([config["against"], other, "1"])
    return TerminalTable(Part(table=Table(header, lines, note)))


def plan_table(preview: dict[str, Any]) -> TerminalTable:
    """What a compression will do and cost, from `mea.compression.preview`."""
    before, after = preview["bytes_per_token_before"], preview["bytes_per_token"]
    unit = "original with 16 bits" if "tiers" in preview else preview["dtype"]
    smaller = "; --dtype bfloat16 halves it" if preview["dtype"] == "float32" else ""
    copied = preview.get("calibration_copy_fraction")
    spans = f", repeated spans in {copied:.0%} of the windows" if copied else ""
    lines = {
        "method": READINGS.get(preview["method"], preview["method"]),
        **(_bits(preview) if "tiers" in preview else {"ranks (keys, values)": _ranges(preview["ranks"])}),
        "cache per token": f"{before:,} → {after:,} bytes ({after / before:.1%}), {unit}",
        f"cache at {preview['context']:,} tokens": f"{size(preview['bytes_at_context_before'])} → "
        + size(preview["bytes_at_context"]),
        "calibration": f"{preview['calibration_tokens']:,} tokens of the text {preview['calibration_text']}{spans}",
        "refinement": f"{preview['refinement']['passes']} passes" if preview.get("refinement") else "",
        "memory beyond the weights": f"about {size(preview['memory'])}",
        "size of the result": f"about {size(preview['result_bytes'])} in {preview['dtype']}{smaller}",
        "time for the fit": f"about {preview['seconds'] / 60:,.1f} min on this machine",
    }
    table = Table(["", ""], [[name, value] for name, value in lines.items() if value], texts=2)
    return TerminalTable(Part(f"Compressing {preview['model']}", table=table))


def compression_table(record: Record, out: str) -> TerminalTable:
    """The cache and the perplexity before and after a compression, from the record that it leaves."""
    config, results = record["config"], record["results"]
    before, after = results["cache_bytes_per_token_before"], results["cache_bytes_per_token"]
    lines = [["cache bytes per token", f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.3f}"]]
    if "perplexity" in results:
        lines.append([
            "perplexity",
            f"{results['perplexity_before']:.2f}",
            f"{results['perplexity']:.2f}",
            with_error(results["perplexity_ratio"], results["perplexity_ratio_error"]),
        ])  # fmt: skip
    errors = results["self_check"]
    whole, decoded = "with all components in full precision", ", in fp64"
    if "tiers" not in config:
        whole, decoded = "at full rank", ""
    note = (
        f"Checked: the largest relative difference is {errors['full_rank']:.0e} between the original's logits and "
        f"those {whole}, in fp32, and {errors['cached']:.0e} between decoding with the cache and one pass over "
        f"all tokens{decoded}. ± is one standard error."
    )
    if "perplexity" in results:
        note = f"Perplexity of the first {config['measured_tokens']:,} tokens of {config['measured_text']}. {note}"
    if "tiers" in config:
        note = f"Bytes at {config['context']:,} tokens, the original's in 16 bits. {note}"
        bits = mean_bits(config["tiers"], config["numbers"])
        note += " Components of a layer with 8, 4, 2 and 0 bits, on average: " + ", ".join(map(str, bits))
        note += f" (of {config['numbers']:,}); exact are the first {config['first']} and the newest {config['recent']} "
        note += "tokens."
    header = ["measured", config["model"], "compressed", "ratio"]
    return TerminalTable(Part(f"Saved to {out}", table=Table(header, lines, note)))


def _bits(preview: dict[str, Any]) -> dict[str, str]:
    return {
        "bits": f"8, 4, 2 or 0 for each of {preview['numbers']:,} components a layer, by one threshold over all layers",
        "exact tokens": f"the first {preview['first']} and the newest {preview['recent']}",
        "budget": f"{preview['keep']:.1%} of the cache in 16 bits, at {preview['context']:,} tokens",
    }


def _ranges(ranks: list[list[int] | None]) -> str:
    """``layers 0-2: not compressed; 3-29: 96, 96``."""
    runs: list[tuple[int, int, list[int] | None]] = []
    for layer, pair in enumerate(ranks):
        if runs and runs[-1][2] == pair:
            runs[-1] = (runs[-1][0], layer, pair)
        else:
            runs.append((layer, layer, pair))
    named = [f"{a}-{b}: {'not compressed' if pair is None else f'{pair[0]}, {pair[1]}'}" for a, b, pair in runs]
    return "layers " + "; ".join(named[:6]) + (f"; … ({len(runs)} runs)" if len(named) > 6 else "")
