"""Where records come from: files, and folders searched all the way down."""

import json
from collections.abc import Iterable
from pathlib import Path

from mea.records import Record, read_record


def find_records(places: Iterable[str | Path]) -> list[Record]:
    """Records in files and in folders with all that is below them, sorted by path within each place, each file once.

    In folders, JSON files that are something else (a model's configuration, say) are passed over, and so is what is
    hidden; a file that is named must be a record.

    Raises
    ------
    FileNotFoundError
        A place does not exist.
    ValueError
        A file that is named is no record; a record is damaged; no record is found.
    """
    found: dict[Path, Record] = {}
    places = [Path(place) for place in places]
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"there is nothing at {place}: give a folder of records, or a record")
        if place.is_file():
            found.setdefault(place.resolve(), read_record(place))
            continue
        for path in sorted(place.rglob("*.json")):
            hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
            if not hidden and path.resolve() not in found and _is_record(path):
                found[path.resolve()] = read_record(path)
    if not found:
        raise ValueError(f"no record in {', '.join(map(str, places)) or 'nothing'}: give folders with *.json records")
    return list(found.values())


def reference_first(records: Iterable[Record], kind: str, paired: str) -> list[Record]:
    """Records of a kind, each model's together; first those of models that others are compared with (`paired`)."""
    records = list(records)
    references = {record["config"]["second"] for record in records if record["kind"] == paired}
    found = [record for record in records if record["kind"] == kind]
    names = list(dict.fromkeys(map(name_of, found)))
    return sorted(found, key=lambda record: (name_of(record) not in references, names.index(name_of(record))))


def name_of(record: Record) -> str:
    """A model's name in a record: its label, if it has one."""
    return str(record["config"].get("label") or record["config"].get("model", "?"))


def _is_record(path: Path) -> bool:
    """Whether a file means to be a record; one that is cut short does."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True
    return isinstance(data, dict) and "kind" in data and "samples" in data
