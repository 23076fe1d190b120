"""Answers of a model, stored as they are produced, so that an interrupted evaluation continues.

One JSON line per answer, keyed by a digest of the request. The first line identifies model, data and precision; an
evaluation with others does not reuse the answers.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mea.records import parse_json

Answer = tuple[float, bool] | float | str


class Journal:
    """Answers by request.

    Parameters
    ----------
    path
        File to append to; None keeps nothing.
    about
        What the answers depend on. A file about something else is begun anew.
    """

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] | None = None):
        self.path, self.answers = path, {}
        head = json.dumps({"about": dict(about or {})}, sort_keys=True)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if not lines or lines[0] != head:
            path.write_text(head + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                key, value = parse_json(line)
            except ValueError:  # cut short by the interruption
                continue
            self.answers[key] = tuple(value) if isinstance(value, list) else value
        if not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def __contains__(self, key: str) -> bool:
        return key in self.answers

    def __getitem__(self, key: str) -> Any:
        return self.answers[key]

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep some answers, on disk before this returns."""
        self.answers |= answers
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, value]) + "\n" for key, value in answers.items())

    @staticmethod
    def key(kind: str, request: Any) -> str:
        """The digest of a request."""
        return hashlib.sha256(json.dumps([kind, request], sort_keys=True, default=str).encode()).hexdigest()[:24]
