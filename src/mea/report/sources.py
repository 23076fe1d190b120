"""Finds records: files, and folders searched recursively."""

from collections.abc import Callable, Iterable
from pathlib import Path

from mea.records import Record, read_json, read_record
from mea.report.schema import check_fields


def find_records(paths: Iterable[str | Path], on_invalid: Callable[[str], None] | None = None) -> list[Record]:
    """Records in files and in folders with all that is below them, sorted by path within each folder, each file once.

    In folders, JSON files that are no records (for instance a model's configuration) and hidden files are
    skipped; a file given by name must be a record.

    Parameters
    ----------
    on_invalid
        Called with a message for each record that is damaged or lacks a field that its section shows; the record is
        left out. Without it such a record is an error.

    Raises
    ------
    FileNotFoundError
        A path does not exist.
    ValueError
        A file given by name is no record; a record is damaged or lacks a field; no record is left.
    """
    records: dict[Path, Record] = {}
    invalid: list[str] = []
    sources = [Path(path) for path in paths]
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"there is nothing at {source}: give a folder of records, or a record")
        for path in [source] if source.is_file() else _record_files(source):
            if path.resolve() in records:
                continue
            try:
                record = read_record(path)
                check_fields(record, str(path))
            except ValueError as error:
                if on_invalid is None:
                    raise
                invalid.append(str(error))
                on_invalid(str(error))
            else:
                records[path.resolve()] = record
    if invalid and not records:
        raise ValueError(f"no valid record: {invalid[0]}" + (f" (and {len(invalid) - 1} more)" if invalid[1:] else ""))
    if not records:
        raise ValueError(f"no record in {', '.join(map(str, sources)) or 'nothing'}: give folders with *.json records")
    return list(records.values())


def reference_first(records: Iterable[Record], kind: str, paired: str) -> list[Record]:
    """Records of a kind, each model's together; first those of models that others are compared with (`paired`)."""
    records = list(records)
    references = {record["config"]["second"] for record in records if record["kind"] == paired}
    chosen = [record for record in records if record["kind"] == kind]
    names = list(dict.fromkeys(map(name_of, chosen)))
    return sorted(chosen, key=lambda record: (name_of(record) not in references, names.index(name_of(record))))


def name_of(record: Record) -> str:
    """A model's name in a record: its label, if it has one."""
    return str(record["config"].get("label") or record["config"].get("model", "?"))


def _record_files(folder: Path) -> Iterable[Path]:
    """JSON files in a folder that are not hidden and mean to be records; one that is cut short does."""
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            data = read_json(path)
        except ValueError:
            yield path
            continue
        if isinstance(data, dict) and "kind" in data and "samples" in data:
            yield path
