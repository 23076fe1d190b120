"""Write docstrings of installed Python packages into a text file, to train on: documentation of the technical kind.

    python experiments/recovery/make_docstrings.py OUT.txt numpy scipy scikit-learn=sklearn pandas

They are shuffled, and enough of them taken for `CHARACTERS`.
"""

import ast
import inspect
import random
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

CHARACTERS = 2_500_000


def docstrings(module: str) -> list[str]:
    """Those of public functions and classes, in the order of the files, each once."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{module} is not installed")
    found: dict[str, None] = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        if any("test" in part for part in path.parts[-3:]):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text and len(text) > 800:
                    found[f"{node.name}\n\n{inspect.cleandoc(text)}"] = None
    return list(found)


def main() -> None:
    out, *packages = sys.argv[1:]
    texts = []
    for package in packages:
        name, _, module = package.partition("=")
        print(name, version(name))
        texts += docstrings(module or name)
    random.Random(0).shuffle(texts)
    Path(out).write_text("\n\n\n".join(texts)[:CHARACTERS] + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
