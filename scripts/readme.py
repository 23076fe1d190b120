"""Write the README's table and figure from the committed records, or check with --check that they are up to date."""

import argparse
import sys
from pathlib import Path

from mea.records import read_records
from mea.report.parts import Table
from mea.report.render.markdown import table_markdown
from mea.report.render.svg import standalone
from mea.report.sections import comparison_figures
from mea.report.sections.comparison_rows import cells, footnote, rows

ROOT = Path(__file__).parent.parent
RECORDS, README, FIGURE = ROOT / "experiments/coding/records/seed0", ROOT / "README.md", ROOT / "docs/pareto.svg"
START = "<!-- results: written by scripts/readme.py from the records of experiments/coding -->"
END = "<!-- end of results -->"


def results() -> tuple[str, str]:
    """The block of the README and the text of the figure."""
    methods = rows(read_records(RECORDS, "comparison"))
    drawn = comparison_figures.ratio_against_bytes(methods, "texts")
    if drawn is None:
        raise ValueError(f"the records in {RECORDS.name} hold no sizes to draw")
    machine = methods[0].record["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores"
    block = [
        START,
        "",
        f"{methods[0].model} without training ({where}; `experiments/coding`):",
        "",
        table_markdown(Table(*cells(methods))).rstrip(),
        "",
        footnote(methods),
    ]
    name = FIGURE.relative_to(ROOT)
    block += ["", f"![Perplexity relative to the uncompressed model, against bytes]({name})", "", END]
    return "\n".join(block), standalone(drawn.svg).rstrip("\n") + "\n"


def main() -> None:
    """Write, or compare and leave with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    block, figure = results()
    text = README.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    new = before + block + after
    if check:
        if new != text or not FIGURE.is_file():
            sys.exit("README.md is not what the records say: run scripts/readme.py")
        return
    README.write_text(new, encoding="utf-8")
    FIGURE.write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    main()
