"""Documents from text, JSONL, Parquet or a hub data set, streamed: never all of them in memory."""

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mea.train.pretraining.settings import DataSettings

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
# What readers raise on such files; StopIteration on an empty JSON file.
DAMAGED = (EOFError, OSError, RuntimeError, StopIteration, ValueError, lzma.LZMAError, zlib.error)
CHUNK = 1 << 20  # characters of text read at a time


def source_files(data: DataSettings) -> list[Path]:
    """The files of a data set that is not on a hub, sorted by name; a folder stands for what it holds.

    Raises
    ------
    FileNotFoundError
        A path that does not exist.
    ValueError
        A file of an unknown kind, or a folder without any of a known kind.
    """
    paths: list[Path] = []
    for path in map(Path, data.files):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and _kind(p) == data.kind)
            if not inside:
                raise ValueError(f"{path} holds no {data.kind} files")
            paths += inside
        elif path.is_file():
            if _kind(path) is None:
                raise ValueError(
                    f"{path} is of an unknown kind: known are {', '.join(KINDS)}, plain or compressed as "
                    f"{', '.join(OPENERS)}"
                )
            paths.append(path)
        else:
            raise FileNotFoundError(f"no training text at {path}: there is no such file or folder")
    return paths


def documents(data: DataSettings) -> Iterator[str]:
    """All documents of a data set in their order, empty ones left out."""
    if data.hub is not None:
        stream = _from_hub(data)
    else:
        stream = (text for path in source_files(data) for text in _from_file(path, data))
    return (text for text in stream if text.strip())


def is_validation(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its text alone, so that copies stay together."""
    digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _kind(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix in OPENERS else path
    return KINDS.get(name.suffix)


def _from_file(path: Path, data: DataSettings) -> Iterator[str]:
    kind = _kind(path)
    assert kind is not None
    items = _items(path, kind, data.separator)
    return items if kind == "text" else _column(items, data.column, str(path))


def _items(path: Path, kind: str, separator: str | None) -> Iterator[Any]:
    """Texts of a text file, rows of other files."""
    try:
        if kind == "text":
            with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
                yield from _split(file, separator)
        else:
            import datasets  # reads compressed JSON lines and Parquet row group by row group

            yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except DAMAGED as error:
        if getattr(error, "errno", None) is not None:  # the system's, not a decompressor's
            raise
        raise ValueError(f"{path} is empty, damaged, or not UTF-8 {kind}: {error}") from error


def _from_hub(data: DataSettings) -> Iterator[str]:
    import datasets

    assert data.hub is not None
    rows = datasets.load_dataset(data.hub, data.hub_config, split=data.hub_split, streaming=True)
    yield from _column(rows, data.column, str(data.hub))


def _column(rows: Iterable[Any], column: str, where: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get(column), str):
            raise ValueError(f"{where}: no text in column {column!r}; there are {', '.join(map(str, row))}")
        yield row[column]


def _split(file: io.TextIOWrapper, separator: str | None) -> Iterator[str]:
    """The parts of a file between separators, reading a piece at a time; the whole file without a separator."""
    if separator is None:
        yield file.read()
        return
    rest = ""
    while piece := file.read(CHUNK):
        *whole, rest = (rest + piece).split(separator)
        yield from whole
    yield rest
