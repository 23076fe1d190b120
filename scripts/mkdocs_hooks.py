"""Hooks of MkDocs (mkdocs.yml): the guides, the README and the experiments as one site.

Links in the repository work on the site: those to pages become links within the site, those to other files the file's
name. The build fails if a name of the public API in docs/api.md, or a public method of it, has no docstring.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import Abort
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
OPTIONAL = {"serving.md", "conformance.md"}  # pages of the navigation that need not exist


def on_config(config: Any) -> Any:
    """Leave out the optional pages that do not exist."""
    missing = {name for name in OPTIONAL if not (ROOT / "docs" / name).is_file()}
    config["nav"] = _without(config["nav"], missing)
    return config


def _without(nav: list[Any], missing: set[str]) -> list[Any]:
    """A navigation, a list of pages and of sections with such lists, without some pages."""
    kept = []
    for ((title, value),) in (item.items() for item in nav):
        if isinstance(value, list):
            kept.append({title: _without(value, missing)})
        elif value not in missing:
            kept.append({title: value})
    return kept


def on_pre_build(config: Any) -> None:
    """Check the docstrings of the public API."""
    names = re.findall(r"^::: ([\w.]+)", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    package = griffe.load("mea", search_paths=[str(ROOT / "src")], resolve_aliases=True)
    lacking = []
    for name in names:
        item = package[name.removeprefix("mea.")]
        item = item.final_target if item.is_alias else item
        if not item.has_docstring:
            lacking.append(name)
        if item.is_class:
            own = (x for x in item.members.values() if x.is_function and x.is_public and not x.name.startswith("_"))
            inherited = {base for parent in item.mro() for base in parent.members}
            lacking += [
                f"{name}.{x.name}" for x in own if not x.has_docstring and x.name not in inherited | {"forward"}
            ]
    if lacking:
        raise Abort(f"no docstring: {', '.join(lacking)}")


def on_files(files: Any, config: Any) -> Any:
    """Add the README as the first page, and the pages and figures of the experiments."""
    options = (config["site_dir"], config["use_directory_urls"])
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=index))
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.name == "README.md" or path.suffix in (".svg", ".png"):
            files.append(File(str(path.relative_to(ROOT)), str(ROOT), *options))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site."""
    uri = page.file.src_uri
    source = ROOT / ("README.md" if uri == "index.md" else uri if uri.startswith("experiments/") else f"docs/{uri}")

    if uri.startswith("log/"):  # a line for each part of an entry
        markdown = re.sub(r"\n(?=\*\*(?:Tried|Found|Consequence|Decided))", "  \n", markdown)

    def replace(match: re.Match) -> str:
        mark, words, path, anchor = match.groups()
        target = (source.parent / path).resolve()
        if not target.exists():
            return match[0]  # MkDocs complains
        name = target.relative_to(ROOT).as_posix()
        within = "index.md" if name == "README.md" else name.removeprefix("docs/")
        if files.get_file_from_path(within) is None:
            return f"`{name}`" if words.startswith("`") else f"{words} (`{name}`)"
        up = "../" * uri.count("/")
        return f"{mark}[{words}]({up}{within}{anchor or ''})"

    return LINK.sub(replace, markdown)
