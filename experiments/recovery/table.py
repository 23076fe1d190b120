"""Write the rows of the paper's second table into the README, from the records of `run.py` and of the tasks."""

from pathlib import Path

from run import ROWS, TABLE_STARTS

from mea.records import Record, read_record
from mea.report import write_markdown
from mea.report.parts import Part, Section, Table

HERE = Path(__file__).parent
RECORDS, TASKS, README = HERE / "records", HERE / "records" / "tasks", HERE / "README.md"
BASELINE = "whole-cpt"


def read(path: Path) -> Record | None:
    return read_record(path) if path.is_file() else None


def line(name: str, what: str, of: str = "") -> list[str]:
    """A row: ``of`` is empty for a state after training, and ``_start`` for the one before it."""
    record = read(RECORDS / f"{name}.json")
    if record is None:
        return []
    results = record["results"]
    found, base = results[f"perplexity{of}"], read_record(RECORDS / f"{BASELINE}.json")["results"]["perplexity"]
    cells = [what, f"{found:,.4g}", f"{found / base:.3g}", f"{results[f'held_out{of}']['ce']:.3f}"]
    paired = read(TASKS / f"paired-{what}-{BASELINE}.json")
    if name == BASELINE and not of:
        average = next((read_record(path)["results"]["average"] for path in TASKS.glob("paired-*.json")), None)
        return [*cells, f"{100 * average['second']:.1f}" if average else "–", "0"]
    if paired is None:
        return [*cells, "–", "–"]
    average = paired["results"]["average"]
    low, high = (100 * bound for bound in average["interval"])
    return [*cells, f"{100 * average['first']:.1f}", f"{100 * average['difference']:+.1f} ({low:+.1f} to {high:+.1f})"]


def rows() -> list[list[str]]:
    """The table, a list of cells a row."""
    found = [line(BASELINE, "uncompressed", "_start")]
    for start in TABLE_STARTS:
        for name in (f"{start}-cpt", f"{start}-recover-cpt"):
            if name in ROWS:
                found.append(line(name, name))
    return [each for each in found if each]


def main() -> None:
    head = [
        "row",
        "perplexity, WikiText-2 test",
        "relative to whole-cpt",
        "held-out loss, nats",
        "tasks, %",
        "points from whole-cpt",
    ]
    write_markdown([Section("Rows", [Part(table=Table(head, rows()))])], README)


if __name__ == "__main__":
    main()
