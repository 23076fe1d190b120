"""Checkpoints that can be trusted: one counts only if a mark, written after everything else, fits its files."""

import json
import os
import shutil
import zlib
from pathlib import Path

MARK = "complete.json"


def mark_complete(folder: Path) -> None:
    """Write the sizes and checksums of a checkpoint's files beside them, once all are on the disk."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARK}
    for path in files.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    content = {name: [path.stat().st_size, checksum_of(path)] for name, path in files.items()}
    partial = folder / f"{MARK}.partial"
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(folder / MARK)


def is_complete(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return bool(content) and all(
            (folder / name).stat().st_size == size and checksum_of(folder / name) == checksum
            for name, (size, checksum) in content.items()
        )
    except (OSError, ValueError):
        return False


def last_complete(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and the names of newer ones that are not; these are removed."""
    found = sorted(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    bad: list[str] = []
    for folder in found:
        if is_complete(folder):
            return folder, bad
        bad.append(folder.name)
        shutil.rmtree(folder)
    return None, bad


def checksum_of(path: Path) -> int:
    """CRC-32 of a file, read a piece at a time."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value
