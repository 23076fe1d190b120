"""Complete checkpoints: a file of checksums, written last, must match all other files."""

import json
import os
import shutil
import zlib
from pathlib import Path

from mea.records import read_json, write_atomically

MARK = "complete.json"


def mark_complete(folder: Path) -> None:
    """Write the sizes and checksums of a checkpoint's files beside them, once all are on the disk."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARK}
    for path in files.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    content = {name: [path.stat().st_size, checksum_of(path)] for name, path in files.items()}
    write_atomically(folder / MARK, json.dumps(content))


def is_complete(folder: Path) -> bool:
    """Whether every file is there as it was written; a mark that names files elsewhere is none."""
    try:
        content = read_json(folder / MARK)
        return bool(content) and all(
            (folder / name).resolve().is_relative_to(folder.resolve())
            and (folder / name).stat().st_size == size
            and checksum_of(folder / name) == checksum
            for name, (size, checksum) in content.items()
        )
    except (AttributeError, OSError, TypeError, ValueError):  # no mark, or not one of ours
        return False


def last_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is complete, and the names of newer ones that are not; these are removed."""
    numbered = (path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal())
    newest_first = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    incomplete: list[str] = []
    for folder in newest_first:
        if is_complete(folder):
            return folder, incomplete
        incomplete.append(folder.name)
        shutil.rmtree(folder)
    return None, incomplete


def checksum_of(path: Path) -> int:
    """CRC-32 of a file, read in pieces of 4 MiB."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum
