"""The settings stored beside checkpoints, and runs that branch off another run's checkpoint with a decay."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mea.records import read_json, write_atomically
from mea.train.checkpoints import is_complete
from mea.train.pretraining.settings import DataSettings, PretrainSettings

SETTINGS = "settings.json"  # of a run, beside its checkpoints
BRANCH = "branch.json"  # of a run that went on from another's
FREE = {  # settings that a branch may change: none has an effect on the steps before
    *("optim.schedule", "optim.decay_fraction", "optim.final_fraction", "optim.tokens"),
    *("run.micro_batch_rows", "run.validations", "run.checkpoints", "run.report_to", "run.divergence"),
}


def stored(settings: PretrainSettings) -> dict[str, Any]:
    """Settings as nested dicts for JSON, without paths of files, which do not identify a run."""
    tables = asdict(settings)
    tables["data"]["files"] = [Path(name).name for name in tables["data"]["files"]]
    return json.loads(json.dumps(tables))


def differing(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Fields (``table.field``) that differ between two results of `stored`; missing old fields have defaults."""
    defaults = asdict(PretrainSettings(DataSettings(("any",))))
    return [
        f"{table}.{name}"
        for table, values in new.items()
        for name, value in values.items()
        if value != old.get(table, {}).get(name, defaults[table].get(name))
    ]


def check_same_run(settings: PretrainSettings, out: Path) -> None:
    """Refuse to continue a run with other settings.

    Raises
    ------
    ValueError
        The folder holds a run with other settings.
    """
    path = out / SETTINGS
    if path.is_file() and (changed := differing(stored(settings), _tables(path))):
        raise ValueError(f"{out} holds a run with other settings ({', '.join(changed)}): choose another folder")


def write_settings(settings: PretrainSettings, out: Path) -> None:
    """Store the settings in a run's folder, once nothing but training is left to do."""
    if not (out / SETTINGS).is_file():
        write_atomically(out / SETTINGS, json.dumps(stored(settings), indent=1))


def adopt(checkpoint: Path, settings: PretrainSettings, out: Path) -> Path:
    """Copy another run's checkpoint into the folder of a new run, which then continues from it.

    Raises
    ------
    ValueError
        The checkpoint is not complete; its run differs in more than the schedule; the new schedule has another learning
        rate before that step.
    """
    if not is_complete(checkpoint):
        raise ValueError(f"{checkpoint} is no complete checkpoint: give a folder checkpoint-STEP of a run")
    base = _tables(checkpoint.parent / SETTINGS)
    changed = [name for name in differing(stored(settings), base) if name not in FREE and name[:7] != "labels."]
    if changed:
        raise ValueError(
            f"a run that starts from {checkpoint} needs its settings, but these differ: {', '.join(changed)}"
        )
    step, optim = int(checkpoint.name.rpartition("-")[2]), settings.optim
    before_decay = optim.steps - optim.decay_steps
    # Only wsd begins like a constant schedule, and with another end it would warm up from another learning rate.
    same = optim.schedule == "constant" or (optim.schedule == "wsd" and optim.final_fraction == 0)
    if base.get("optim", {}).get("schedule") != "constant" or not same or step > before_decay:
        raise ValueError(
            f"a run that starts from {checkpoint} must share its learning rate to step {step}: give a checkpoint of a "
            "run at a constant rate, and schedule = 'wsd' with final_fraction = 0 and its decay after this step "
            f"(here: {optim.schedule!r}, final_fraction {optim.final_fraction:g}, decay from {before_decay})"
        )
    adopted, partial = out / checkpoint.name, out / "adopted.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    write_atomically(out / BRANCH, json.dumps({"step": step}))
    partial.replace(adopted)
    return adopted


def branched_at(out: Path) -> int | None:
    """The step at which a run branched off another run; None if it did not.

    Raises
    ------
    ValueError
        The file that says so is damaged.
    """
    path = out / BRANCH
    if not path.is_file():
        return None
    content = read_json(path)
    step = content.get("step") if isinstance(content, dict) else None
    if type(step) is not int:
        raise ValueError(f"{path} is damaged (it has no step); remove the run's folder to begin again")
    return step


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    """The settings that a run stored.

    Raises
    ------
    ValueError
        The file is damaged.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(table, dict) for table in content.values()):
        raise ValueError(
            f"{path} is damaged (it does not hold tables of settings); remove the run's folder to begin again"
        )
    return content
