"""Make docstrings.txt.gz: documentation and code of Python packages, as they are installed.

    python experiments/calibration_text/make_docstrings.py [--out FOLDER]

Docstrings of public functions and classes, and a smaller share of plain functions as code; both without anything that
shares 13 consecutive words with a text that is tested on. The same versions of the packages give the same bytes.
README.md says what it is for.
"""

import argparse
import ast
import gzip
import hashlib
import inspect
import random
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from mea.texts import load_text

SEED = 20_242
# All of them BSD-3-Clause or MIT.
PACKAGES = ("numpy", "scipy", "networkx", "rich", "typer")
DOCUMENTATION_CHARACTERS, CODE_CHARACTERS = 130_000, 50_000
TESTED = ("wikitext-2-test", "wikitext-2-valid", "technical")
RUN = 13


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of consecutive words."""
    words = text.split()
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def pieces(package: str) -> tuple[list[str], list[str]]:
    """Documentation and code of a package's public functions and classes."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed")
    root = Path(spec.submodule_search_locations[0])
    documentation, code = [], []
    for path in sorted(root.rglob("*.py")):
        if any("test" in part or part.startswith("_vendor") for part in path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            found = ast.get_docstring(node)
            if found and 1200 < len(found) < 6000 and text.isascii():
                documentation.append(f"{node.name}\n\n{inspect.cleandoc(found)}")
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.FunctionDef) and not found and 800 < len(source) < 3000:
                code.append(source)
    return documentation, code


def choose(found: list[str], characters: int, rng: random.Random, taken: set[tuple[str, ...]]) -> list[str]:
    """Pieces in random order until there are enough characters; none repeats what was taken or is tested on."""
    rng.shuffle(found)
    chosen, size = [], 0
    for piece in found:
        if size >= characters:
            break
        own = runs(piece)
        if not own.isdisjoint(taken):
            continue
        chosen.append(piece)
        taken |= own
        size += len(piece)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    out = parser.parse_args().out
    rng = random.Random(SEED)
    taken = set().union(*(runs(load_text(name)) for name in TESTED))
    documents = []
    for package in PACKAGES:
        documentation, code = pieces(package)
        documents += choose(documentation, DOCUMENTATION_CHARACTERS // len(PACKAGES), rng, taken)
        documents += choose(code, CODE_CHARACTERS // len(PACKAGES), rng, taken)
        print(f"{package} {version(package)}")
    rng.shuffle(documents)
    text = "\n\n\n".join(documents) + "\n"
    path = out / "docstrings.txt.gz"
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    print(f"{path.name}  {len(text):,} characters  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
