"""Rows of the zero-shot tasks from local files, checked, in the fields that lm-evaluation-harness's tasks read.

A folder holds a folder per task with one file, ``test.jsonl`` or else ``validation.jsonl``, plain or ``.gz``. Two
formats are read: the fields of the data sets as published, and for ARC and OpenBookQA also ready queries with
``choices`` and the index ``gold``, whose wording is that of the harness's prompt.
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea.evaluate.suites import ZERO_SHOT
from mea.records import parse_json

NAMES = ("test.jsonl.gz", "test.jsonl", "validation.jsonl.gz", "validation.jsonl")
Row = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """The rows of one task; `digest` identifies the file, `split` is what the harness calls it."""

    task: str
    split: str
    rows: tuple[Row, ...]
    digest: str


def read_task(folder: str | Path, task: str, limit: int | None = None) -> TaskData:
    """Read and check one task's rows, at most `limit` of them.

    Raises
    ------
    ValueError
        No such task, or a row that is not what the task needs; the message names file and row.
    OSError
        The folder or the file does not exist.
    """
    if task not in ZERO_SHOT:
        raise ValueError(f"task {task!r} cannot be read from local files; these can: {', '.join(ZERO_SHOT)}")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of rows must be positive, not {limit}")
    path = _find(Path(folder), task)
    data = path.read_bytes()
    try:
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").splitlines()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(READERS[task](_object(line)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"the field {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, row {number}: {what}; expected {FORMATS[task]}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows")
    split = "test" if path.name.startswith("test") else "validation"
    return TaskData(task, split, tuple(rows[:limit]), hashlib.sha256(data).hexdigest()[:16])


def _find(folder: Path, task: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}")
    path = next((folder / task / name for name in NAMES if (folder / task / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / task} holds none of {', '.join(NAMES)}: the task {task} needs one")
    return path


def _object(line: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object, not {type(row).__name__}")
    return row


def _text(row: Row, *names: str) -> dict[str, str]:
    for name in names:
        if not isinstance(row[name], str):
            raise ValueError(f"the field {name!r} is no text")
    return {name: row[name] for name in names}


def _one_of(value: Any, allowed: tuple[Any, ...], name: str) -> Any:
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(map(str, allowed))}")
    return value


def _piqa(row: Row) -> Row:
    return _text(row, "goal", "sol1", "sol2") | {"label": _one_of(row["label"], (0, 1), "label")}


def _winogrande(row: Row) -> Row:
    fields = _text(row, "sentence", "option1", "option2", "answer")
    if "_" not in fields["sentence"]:
        raise ValueError("the sentence has no '_' to fill")
    _one_of(fields["answer"], ("1", "2"), "answer")
    return fields


def _hellaswag(row: Row) -> Row:
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(x, str) for x in endings):
        raise ValueError("endings is no list of at least two texts")
    fields = _text(row, "ctx_a", "ctx_b", "activity_label")
    label = str(_one_of(str(row["label"]), tuple(map(str, range(len(endings)))), "label"))
    return fields | {"endings": endings, "label": label}


def _science(question: str) -> Callable[[Row], Row]:
    """ARC and OpenBookQA, whose question stands in the field `question`."""

    def read(row: Row) -> Row:
        if "query" in row:
            texts, asked = row["choices"], _text(row, "query")["query"]
            if not asked.startswith("Question: ") or not asked.endswith("\nAnswer:"):
                raise ValueError("the query does not have the form 'Question: …\\nAnswer:'")
            asked = asked.removeprefix("Question: ").removesuffix("\nAnswer:")
            labels = [chr(ord("A") + i) for i in range(len(texts))]
            gold = row["gold"]
            if not isinstance(gold, int) or not 0 <= gold < len(texts):
                raise ValueError(f"gold is {gold!r}, but there are {len(texts)} choices")
            key = labels[gold]
        else:
            texts, labels, asked = row["choices"]["text"], row["choices"]["label"], _text(row, question)[question]
            key = _one_of(_text(row, "answerKey")["answerKey"].strip(), tuple(labels), "answerKey")
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(x, str) for x in texts):
            raise ValueError("the choices are no list of at least two texts")
        if len(labels) != len(texts):
            raise ValueError(f"{len(texts)} choices have {len(labels)} labels")
        return {question: asked, "choices": {"text": texts, "label": labels}, "answerKey": key}

    return read


_QUERY = "query, choices (list) and gold (index), or {}, choices {{text, label}} and answerKey"
READERS: dict[str, Callable[[Row], Row]] = {
    "piqa": _piqa,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "arc_easy": _science("question"),
    "arc_challenge": _science("question"),
    "openbookqa": _science("question_stem"),
}
FORMATS = {
    "piqa": "goal, sol1, sol2, label (0 or 1)",
    "winogrande": "sentence with '_', option1, option2, answer ('1' or '2')",
    "hellaswag": "activity_label, ctx_a, ctx_b, endings (list), label",
    "arc_easy": _QUERY.format("question"),
    "arc_challenge": _QUERY.format("question"),
    "openbookqa": _QUERY.format("question_stem"),
}
