"""Write the index of docs/LOG.md from the entries in docs/log/, or check with --check that it is up to date."""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOG = ROOT / "docs/LOG.md"
START, END = "<!-- begin: written by scripts/log.py -->", "<!-- end -->"
ENTRY = re.compile(r"^## (\d{4}-\d\d-\d\d): (.*)", re.M)


def index() -> str:
    """A table with a row for each entry, newest first."""
    rows = ["| date | finding |", "|---|---|"]
    for month in sorted((ROOT / "docs/log").glob("*.md"), reverse=True):
        for date, title in ENTRY.findall(month.read_text(encoding="utf-8")):
            anchor = re.sub(r"[^\w\- ]", "", f"{date}: {title}".lower()).replace(" ", "-")
            rows.append(f"| {date} | [{title}](log/{month.name}#{anchor}) |")
    return "\n".join([START, "", *rows, "", END])


def main() -> None:
    """Write, or compare and leave with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = LOG.read_text(encoding="utf-8")
    new = text.split(START)[0] + index() + text.split(END)[1]
    if check and new != text:
        sys.exit("docs/LOG.md does not list the entries of docs/log/: run scripts/log.py")
    LOG.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
