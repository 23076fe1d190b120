"""Checks of names and paths that users give; without imports that take long, so that typing errors show at once."""

from pathlib import Path

from mea.names import TEXTS, did_you_mean


def check_model(source: str) -> None:
    """Refuse what is neither there nor reads like a hub id.

    Raises
    ------
    ValueError
        No such folder or file.
    """
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
