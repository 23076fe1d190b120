"""Texts to calibrate and to test on: those that ship with the package, by name, and the user's own files."""

import difflib
import gzip
import zlib
from importlib.resources import files
from pathlib import Path

NAMES = ("wikitext-2-test", "wikitext-2-valid", "technical", "technical-valid", "calibration", "encyclopaedic")


def load_text(name_or_path: str | Path) -> str:
    """The text of a shipped name or of a file.

    Parameters
    ----------
    name_or_path
        One of `NAMES` (``data/README.md`` says what they are), or a UTF-8 file, compressed if it ends in ``.gz``.

    Raises
    ------
    ValueError
        No such name; or the file is not UTF-8, is a damaged ``.gz``, or holds nothing but white space.
    OSError
        The file does not exist or cannot be read.
    """
    if str(name_or_path) in NAMES:
        data = (files("mea") / "data" / f"{name_or_path}.txt.gz").read_bytes()
        return gzip.decompress(data).decode("utf-8")
    path = Path(name_or_path)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        close = difflib.get_close_matches(path.name.lower(), NAMES, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"no text named {str(path)!r}: {guess}names are {', '.join(NAMES)}; anything else is a file")
    return _read(path)


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text
