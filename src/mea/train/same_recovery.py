"""The same short training for several compressed models of one original, for comparisons."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mea.models.loading import load_tokenizer
from mea.records import Progress
from mea.train.recovery.api import describe, recover
from mea.train.recovery.data import windows
from mea.train.recovery.settings import Recovery, recovery

SLOWER = 0.5  # rates relative to the presets', whose steps read four windows: few tokens are spent best one by one


def one_by_one(preset: str = "distil", **changes: Any) -> Recovery:
    """A preset in steps of one window, at rates that suit these."""
    rates = {name: SLOWER * getattr(recovery(preset), name) for name in ("rate", "base_lr")}
    return recovery(preset, batch=1, micro_batch=1, **rates | changes)


NEAR = {name: getattr(one_by_one("near"), name) for name in ("rate", "base_lr")}


class SameRecovery:
    """Trains copies of models, each on the same windows in the same order.

    Joint latents begin nearer to the original than other forms, and at the usual rates move away from it: they train at
    those of the stage ``near``, one window a step.

    Parameters
    ----------
    source
        The uncompressed model, for its tokenizer.
    texts, settings
        As in `mea.train.recovery.save.recover_to_folder`; `one_by_one` makes settings.
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
        self.description: dict[str, Any] = {
            **describe(settings), "joint": NEAR, "texts": [Path(text).name for text in texts]
        }  # fmt: skip

    def __call__(self, student: Any, original: Any, name: str) -> Any:
        """A trained copy of `student` in its best state; `original` is only read."""
        model, folder = copy.deepcopy(student).float(), self.folder / name
        settings = replace(self.settings, **NEAR) if student.config.latent_form == "joint" else self.settings
        return recover(model, original, self.rows, self.held_out, settings, folder, progress=self.progress).model
