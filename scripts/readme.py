"""Write the tables and the figure of README.md and docs/choosing.md from the committed records.

With --check, compare instead.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from mea.records import read_records
from mea.report.formatting import with_error
from mea.report.render.svg import standalone
from mea.report.sections import comparison_figures
from mea.report.sections.comparison_rows import Row, rows

ROOT = Path(__file__).parent.parent
RECORDS, TIMES = ROOT / "experiments/coding/records/seed0", ROOT / "benchmarks/results/decode_model.json"
FIGURE = ROOT / "docs/pareto.svg"
START, END = "<!-- results: written by scripts/readme.py from records -->", "<!-- end of results -->"
HOW = {  # how to get what a record measured
    "8 bits": "8 bits: `--cache-bits 8`",
    "4 bits": "4 bits: `--cache-bits 4`",
    "predictive 0.28": "`predictive`: `--keep 0.28`",
    "predictive 0.2": "`predictive`: the default",
    "joint 0.2": "`joint`: `--method joint`",
    "predictive 0.14": "`predictive`: `--keep 0.14`",
    "joint 0.14": "`joint`: `--method joint --keep 0.14`",
    "joint 0.1": "`joint`: `--method joint --keep 0.1`",
}
LEFT_OUT = ("8 bits", "predictive 0.14")  # of the README's table
TIMED = {"4 bits": "4 bits", "predictive 0.2": "predictive20", "joint 0.2": "joint20"}


def percent(row: Row, whole: Row) -> str:
    """The cache's bytes as a share of the uncompressed model's."""
    return f"{100 * (row.bytes_per_token or 0) / (whole.bytes_per_token or 1):.0f} %"


def ratios(row: Row) -> list[str]:
    """Perplexity relative to the uncompressed model, on each text."""
    return [with_error(text["ratio"], text["ratio_standard_error"]) for text in row.measured("texts").values()]


def time(name: str) -> str:
    """Time per token relative to the uncompressed model: the median and the quartiles."""
    if name not in TIMED:
        return "–"
    speedup = json.loads(TIMES.read_text(encoding="utf-8"))["results"]["batch_1"]["speedup"][TIMED[name]]
    median, low, high = (f"{1 / speedup[key]:.2f}" for key in ("median", "upper_quartile", "lower_quartile"))
    return f"{median} ({low} to {high})"


def table(by_name: dict[str, Row], names: list[str]) -> list[str]:
    """Lines of Markdown, one row for each name."""
    lines = [
        "| bytes | method and options | perplexity (×), WikiText-2 | technical prose | time per token (×) |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        cells = [percent(by_name[name], by_name["uncompressed"]), HOW[name], *ratios(by_name[name])]
        lines.append(f"| {' | '.join([*cells, time(name)])} |")
    return lines


def note(by_name: dict[str, Row]) -> str:
    """What the table shows."""
    whole = by_name["uncompressed"]
    machine = whole.record["machine"]
    texts = whole.measured("texts")
    first, second = (f"{text['perplexity']:.1f} on {text['tokens']:,} tokens" for text in texts.values())
    text = f"""
    {whole.model}, without training. Options are those of `mea compress MODEL OUT`; `--cache-bits`, of `mea generate`,
    needs no compression. Everything is relative to the uncompressed model (1 is equal)
    and its 16-bit cache. *Bytes* are those of all tensors of the cache at 8,192 tokens. *Perplexity* is read through
    the cache, ± one standard error; the uncompressed model has {first} of WikiText-2 test and {second} of technical
    prose. *Time* is that of one token after 8,192 tokens: median and quartiles on {machine["cores"]} cores
    ({machine["processor"]}, bf16, not idle), the uncompressed model in its fastest form; – is not measured.
    """
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def contents() -> dict[Path, str]:
    """The text of every file that is written."""
    methods = rows(read_records(RECORDS, "comparison"))
    drawn = comparison_figures.ratio_against_bytes(methods, "texts")
    if drawn is None:
        raise ValueError(f"the records in {RECORDS.name} hold no sizes to draw")
    by_name = {row.name: row for row in methods}
    blocks = {
        ROOT / "README.md": [
            *table(by_name, [name for name in HOW if name not in LEFT_OUT]),
            "",
            note(by_name),
            "",
            f"![Perplexity relative to the uncompressed model, against bytes]({FIGURE.relative_to(ROOT)})",
        ],
        ROOT / "docs/choosing.md": [*table(by_name, list(HOW)), "", note(by_name)],
    }
    written = {FIGURE: standalone(drawn.svg).rstrip("\n") + "\n"}
    for path, block in blocks.items():
        before, rest = path.read_text(encoding="utf-8").split(START)
        written[path] = "\n".join([before + START, "", *block, "", END + rest.split(END)[1]])
    return written


def main() -> None:
    """Write, or compare and leave with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in contents().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path != FIGURE and path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what the records say: run scripts/readme.py")
        elif not path.is_file():
            sys.exit(f"{path.relative_to(ROOT)} is missing: run scripts/readme.py")


if __name__ == "__main__":
    main()
