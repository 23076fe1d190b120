"""Checks of names, paths and budgets that users give; no import takes long, so that a typing error shows at once."""

import re
from pathlib import Path

from mea.names import TEXTS, did_you_mean

LARGEST = 2**63  # tokens and bytes of a budget


def check_models(*sources: str | None) -> None:
    """Refuse what is neither there nor reads like a hub id; None is no model.

    Raises
    ------
    ValueError
        No such folder or file.
    """
    for source in filter(None, sources):
        path = Path(source).expanduser()
        first = path.parts[0] if len(path.parts) > 1 else ""
        local = (
            path.suffix == ".gguf"
            or path.is_absolute()
            or source.startswith((".", "~"))
            or source.count("/") > 1
            or (first and Path(first).is_dir())
        )
        if local and not path.exists():
            raise ValueError(f"{source} does not exist: there is no such folder or file")


def check_text(name_or_path: str | Path) -> None:
    """Raise the errors of `mea.text.load_text` that do not need the text: no such name, no such file."""
    path = Path(name_or_path)
    if str(name_or_path) in TEXTS or path.exists():
        return
    if not path.suffix and len(path.parts) == 1:
        guess = did_you_mean(path, TEXTS)
        raise ValueError(f"no text named {str(path)!r}{guess}; texts are {', '.join(TEXTS)}, anything else is a file")
    raise FileNotFoundError(f"there is no text file {path}")


def check_output(out: Path) -> None:
    """Refuse an output path that exists and is not an empty folder.

    Raises
    ------
    ValueError
        The folder is not empty, or is no folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another, or remove it first")


def unfinished(out: Path) -> Path:
    """The folder of what is kept of an output folder until that is complete."""
    return out.with_name(f"{out.name}.partial")


def check_budget(keep: float | None, budget: str | None, layout: object | None) -> None:
    """Refuse a budget that no model has.

    Raises
    ------
    ValueError
        `keep` is no fraction, `budget` has another form, or there are two budgets.
    """
    if budget is not None and (keep is not None or layout is not None):
        raise ValueError("give one budget: keep, budget (bytes at a context length) or layout")
    if keep is not None:
        check_keep(keep)
    if budget is not None:
        parse_budget(budget)


def check_keep(keep: float) -> None:
    """Refuse what is not above 0 and at most 1."""
    if not 0 < keep <= 1:
        percent = f"; {keep:g} % is {keep / 100:g}" if 1 < keep <= 100 else ""
        raise ValueError(
            f"keep is the fraction of the cache's bytes to keep, above 0 and at most 1, not {keep}{percent}"
        )


def parse_budget(text: str) -> tuple[int, int]:
    """Read ``"64k tokens in 2 GiB"`` as ``(context in tokens, bytes)``.

    Raises
    ------
    ValueError
        The text has another form.
    """
    number = r"(\d+(?:\.\d+)?)"
    pattern = rf"\s*{number}\s*([kKmM]?)\s*(?:tokens?)?\s+in\s+{number}\s*(?:([kKmMgGtT])(i?))?[bB]\s*"
    match = re.fullmatch(pattern, text)
    if not match:
        raise ValueError(f"a budget reads like '64k tokens in 2 GiB' or '8192 in 100 MB', not {text!r}")
    count, scale, amount, unit, binary = match.groups()
    tokens = float(count) * {"": 1, "k": 1024, "m": 1024**2}[scale.lower()]  # infinite, of too many digits
    base = 1024 if binary else 1000
    size = float(amount) * base ** " kmgt".index((unit or " ").lower())
    if not (1 <= tokens <= LARGEST and 1 <= size <= LARGEST):
        raise ValueError(f"a budget needs from 1 to 2^63 tokens and bytes, not {text!r}")
    return int(tokens), int(size)
