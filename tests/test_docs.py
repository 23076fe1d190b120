"""Documents point to what is there: relative links, headings, and paths in backquotes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(readme.parent for readme in (ROOT / "experiments").glob("*/README.md"))
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
PATH = re.compile(r"`((?:experiments|benchmarks|docs)/[\w./-]*\w/?)`")
SOURCE = re.compile(r"`((?:src|tests|scripts)/[\w./-]*\w/?)`")


def documents() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in listed.stdout.split() if (ROOT / name).is_file()]


def anchors(file: Path) -> list[str]:
    """Of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", documents())
def test_links_and_paths_exist(name: str):
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    broken = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    if not name.startswith("docs/log/"):  # its entries name the source files of their day
        broken += [path for path in SOURCE.findall(text) if not (ROOT / path).exists()]
    for link in LINK.findall(text):
        path, _, heading = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (heading and heading not in anchors(file)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_holds_what_runs_it_and_its_records(folder: Path):
    readme = (folder / "README.md").read_text(encoding="utf-8")
    if "It cannot be repeated" not in readme:  # what it measured was removed
        assert [*folder.glob("*.py"), *folder.glob("run.sh"), *folder.glob("sweep.toml")]
    assert list((folder / "records").rglob("*.json"))
    assert not list(folder.glob("*.json")), "records belong into records/"
    index = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    assert f"({folder.name}/README.md)" in index


def test_the_log_lists_its_entries():
    run = subprocess.run([sys.executable, "scripts/log.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("month", sorted((ROOT / "docs/log").glob("*.md")), ids=lambda month: month.name)
def test_entries_of_the_log_are_short(month: Path):
    entries = re.split(r"^## ", month.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert [date for date, *_ in (entry.split(":") for entry in entries)] == sorted(
        (entry.split(":")[0] for entry in entries), reverse=True
    )
    for title, *lines in (entry.splitlines() for entry in entries):
        prose = [line for line in lines if line and not line.startswith("|")]
        assert len(prose) <= 10, title
        assert max(map(len, prose)) <= 100, title
