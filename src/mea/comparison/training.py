"""The same short training for several compressed models of one original, for comparisons."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mea.models.loading import load_tokenizer
from mea.ops.cache_forms import FORMS
from mea.records import Progress
from mea.train.recovery.api import describe, recover
from mea.train.recovery.data import windows
from mea.train.recovery.settings import NEAR_RATES, Recovery, recovery

# Relative to the stages' own learning rates, whose steps read four windows: few tokens are spent best one by one.
SCALE = 0.5


def one_by_one(stage: str = "distill", **changes: Any) -> Recovery:
    """A stage in steps of one window, at learning rates that suit these."""
    lrs = {name: SCALE * getattr(recovery(stage), name) for name in ("lr", "base_lr")}
    return recovery(stage, batch=1, micro_batch=1, **lrs | changes)


class Training(NamedTuple):
    """Training of the recovered models of a comparison.

    Attributes
    ----------
    run
        Takes the compressed model, the original and a name for its files; gives a trained copy.
    description
        For the records.
    """

    run: Callable[[Any, Any, str], Any]
    description: dict[str, Any]


def same_recovery(
    source: str, texts: Sequence[str], settings: Recovery, folder: Path, progress: Progress | None = None
) -> Training:
    """Training of copies of models, each on the same windows in the same order; the nearest at lower learning rates.

    Parameters
    ----------
    source
        The uncompressed model, for its tokenizer.
    texts, settings
        As in `mea.train.recovery.save.recover_to_folder`; `one_by_one` makes settings.
    folder
        Folder of checkpoints, by the models' names; an interrupted training continues.

    Raises
    ------
    ValueError
        The texts are too short, or cannot be read.
    """
    rows, held_out = windows(load_tokenizer(source), texts, settings)

    def run(student: Any, original: Any, name: str) -> Any:
        near = student.config.cache_code is not None or FORMS[student.config.latent_form].shared
        own = replace(settings, **NEAR_RATES) if near else settings
        model = copy.deepcopy(student).float()
        return recover(model, original, rows, held_out, own, folder / name, progress=progress).model

    return Training(run, {**describe(settings), "near": NEAR_RATES, "texts": [Path(text).name for text in texts]})
