"""Measurements as JSON files: one format for all of them.

A record says what ran, on what, and keeps every sample. Tables, figures and the numbers in documents are made from
records only. A record is a dict with these fields:

===========  ======================================================================================================
``format``   `FORMAT`; a file of another format is refused
``kind``     what was measured, such as ``"compression"``: says which results and samples to expect
``config``   what ran: every choice that the result depends on
``seeds``    name -> seed
``results``  what the samples come to
``samples``  name -> everything that was measured, in order
``machine``  processor, architecture, cores, memory in bytes, threads of torch, accelerator
``versions`` package -> version
``commit``   of the checkout that ran, with ``+changes`` if it had some; None outside of one
``date``     UTC, ISO 8601
===========  ======================================================================================================

Nothing in a record tells whose machine it was: there is no host name, and of absolute paths in the configuration only
the last part is kept.
"""

import json
import math
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

FORMAT = 1
PACKAGES = ("mea", "torch", "transformers", "safetensors", "accelerate", "numpy")
LARGEST = 1e150  # of a number, so that its square is finite; nothing that is measured is as large
FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "kind": str,
    "config": dict,
    "seeds": dict,
    "results": dict,
    "samples": dict,
    "machine": dict,
    "versions": dict,
    "commit": (str, type(None)),
    "date": str,
}

Record = dict[str, Any]


@runtime_checkable
class Progress(Protocol):
    """Reports progress: the name of the stage, the finished steps, and all steps."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


def make_record(
    kind: str,
    config: Mapping[str, Any],
    *,
    results: Mapping[str, Any] | None = None,
    samples: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
) -> Record:
    """A record of a measurement made in this process.

    Raises
    ------
    ValueError
        A value is not JSON, or is NaN or infinite; the message says which.
    """
    record = {
        "format": FORMAT,
        "kind": kind,
        "config": _without_places(dict(config)),
        "seeds": dict(seeds or {}),
        "results": dict(results or {}),
        "samples": dict(samples or {}),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _validate(record, "the record")
    return json.loads(
        json.dumps(record)
    )  # as a reader gets it: lists instead of tuples, nothing shared with the caller


def write_record(path: str | Path, record: Record) -> Path:
    """Write one record atomically.

    Raises
    ------
    ValueError
        The record is not valid.
    """
    _validate(record, "the record")
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, text)


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file atomically, with the mode that the umask gives; its folder must exist.

    Raises
    ------
    OSError
        The file could not be written; no incomplete file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power failure could leave a file without content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_record(path: str | Path) -> Record:
    """Read one record.

    Raises
    ------
    ValueError
        The file is not JSON, or not a record of this format.
    """
    record = read_json(path)
    _validate(record, str(path))
    return record


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises
    ------
    ValueError
        It is not JSON; the message begins with the path.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises
    ------
    ValueError
        It is not JSON in UTF-8, or nested too deep.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_records(folder: str | Path, kind: str | None = None) -> list[Record]:
    """All records of a folder (``*.json``), sorted by file name; of one `kind` if it is given.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    ValueError
        A file is not a record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of records at {folder}")
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return [record for record in records if kind in (None, record["kind"])]


def machine() -> dict[str, Any]:
    """The hardware of the measurement; None for unknown values."""
    torch = sys.modules.get("torch")  # a process that has not imported it has not used it
    accelerator = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "accelerator": accelerator,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def commit() -> str | None:
    """The commit of the checkout that contains this file; None for an installed package."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside another project's checkout does not count
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _without_places(value: Any) -> Any:
    """The configuration with absolute paths shortened to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    if isinstance(value, PurePosixPath | PureWindowsPath):
        value = str(value)
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name
    return value


def _validate(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is an object, not {type(record).__name__}")
    if record.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{where}: written in format {record['format']}, this version reads format {FORMAT}")
    for name, kind in FIELDS.items():
        if name not in record:
            raise ValueError(f"{where}: the field {name!r} is missing")
        if not isinstance(record[name], kind):
            raise ValueError(f"{where}: the field {name!r} may not be {type(record[name]).__name__}")
    for name, seed in record["seeds"].items():
        if not isinstance(seed, int):
            raise ValueError(f"{where}: the seed {name} is a whole number, not {seed!r}")
    for name in ("config", "seeds", "results", "samples"):
        try:
            _validate_value(record[name], name, where)
        except RecursionError:
            raise ValueError(f"{where}: {name} is nested too deep") from None


def _validate_value(value: Any, name: str, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} of {name} must be text")
            _validate_value(item, f"{name}.{key}", where)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _validate_value(item, f"{name}[{index}]", where)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        infinite = isinstance(value, float) and not math.isfinite(value)
        what = value if infinite else "larger than any measurement"
        raise ValueError(f"{where}: {name} is {what}")
    elif not isinstance(value, str | int | float | type(None)):
        raise ValueError(f"{where}: {name} is a {type(value).__name__}, which JSON does not have")


def mean_bits(tiers: list[Any], numbers: int) -> tuple[int, int, int, int]:
    """Components with 8, 4, 2 and 0 bits in the mean layer of a packed cache, from its record's fields; all of them."""
    layers = [[sum(section[i] for section in layer) for i in range(3)] for layer in tiers if layer is not None]
    eight, four, two = (round(sum(layer[i] for layer in layers) / max(1, len(layers))) for i in range(3))
    return eight, four, two, max(0, numbers - eight - four - two)
