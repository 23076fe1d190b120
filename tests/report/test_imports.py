"""A report needs no torch: ``mea report`` and ``mea fit`` start without it."""

import ast
from pathlib import Path

import mea

PACKAGE = Path(mea.__file__).parent


def imported(path):
    """Modules that a file imports where it is loaded; what functions import is loaded later."""
    pending, names = list(ast.parse(path.read_text(encoding="utf-8")).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return names


def file_of(module):
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def test_reports_import_no_torch():
    pending = [file for file in (PACKAGE / "report").rglob("*.py")]
    visited, outside = set(), set()
    while pending:
        path = pending.pop()
        if path in visited:
            continue
        visited.add(path)
        for name in imported(path):
            if not name.startswith("mea."):
                outside.add(name.split(".")[0])
                continue
            parts = name.split(".")
            packages = (".".join(parts[:end]) for end in range(2, len(parts) + 1))  # mea itself is loaded by all
            pending += [file for file in map(file_of, packages) if file]
    assert outside.isdisjoint({"torch", "transformers", "scipy", "matplotlib"})
    assert {path.name for path in visited} > {"records.py", "svg.py", "tasks.py"}
