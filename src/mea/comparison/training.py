"""The same short training for several compressed models of one original, for comparisons."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mea.models.loading import load_tokenizer
from mea.ops.cache_forms import FORMS
from mea.records import Progress
from mea.train.recovery.api import describe, recover
from mea.train.recovery.data import windows
from mea.train.recovery.settings import Recovery, recovery

# Relative to the stages' own learning rates, whose steps read four windows: few tokens are spent best one by one.
SCALE = 0.5
# A joint latent begins nearer to the original than other forms, and at their learning rates moves away from it.
JOINT = {"lr": 1.5e-4, "base_lr": 1.5e-4}


def one_by_one(stage: str = "distill", **changes: Any) -> Recovery:
    """A stage in steps of one window, at learning rates that suit these."""
    lrs = {name: SCALE * getattr(recovery(stage), name) for name in ("lr", "base_lr")}
    return recovery(stage, batch=1, micro_batch=1, **lrs | changes)


class SameRecovery:
    """Trains copies of models, each on the same windows in the same order; joint latents at lower learning rates.

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
            **describe(settings), "joint": JOINT, "texts": [Path(text).name for text in texts]
        }  # fmt: skip

    def __call__(self, student: Any, original: Any, name: str) -> Any:
        """A trained copy of `student` in its best state; `original` is only read."""
        model, folder = copy.deepcopy(student).float(), self.folder / name
        settings = replace(self.settings, **JOINT) if FORMS[student.config.latent_form].shared else self.settings
        return recover(model, original, self.rows, self.held_out, settings, folder, progress=self.progress).model
