"""The same short training for several compressed models of one original, for comparisons."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mea.models.loading import load_tokenizer
from mea.train.recovery import describe, recover
from mea.train.recovery_data import windows
from mea.train.recovery_settings import Recovery
from mea.train.recovery_trainer import Progress


class SameRecovery:
    """Trains copies of models, each on the same windows in the same order.

    Parameters
    ----------
    source
        The uncompressed model, for its tokenizer.
    texts, settings
        As in `mea.train.recovery_folder.recover_to_folder`.
    folder
        For checkpoints, by the models' names: an interrupted training goes on.

    Attributes
    ----------
    description
        For a record.

    Raises
    ------
    ValueError
        The texts are too short, or cannot be read.
    """

    def __init__(
        self,
        source: str,
        texts: Sequence[str],
        settings: Recovery,
        folder: Path,
        progress: Progress | None = None,
    ):
        self.settings, self.folder, self.progress = settings, folder, progress
        self.rows, self.held_out = windows(load_tokenizer(source), texts, settings)
        self.description: dict[str, Any] = {**describe(settings), "texts": [Path(text).name for text in texts]}

    def __call__(self, student: Any, original: Any, name: str) -> Any:
        """A trained copy of `student` in its best state; `original` is only read."""
        model, folder = copy.deepcopy(student).float(), self.folder / name
        return recover(model, original, self.rows, self.held_out, self.settings, folder, progress=self.progress).model
