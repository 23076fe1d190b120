"""Whose checkpoints a folder holds, and runs that go on from another run's with a decay instead of training it anew."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mea.train.checkpoints import is_complete
from mea.train.pretraining.settings import DataSettings, PretrainSettings

SETTINGS = "settings.json"  # of a run, beside its checkpoints
BRANCH = "branch.json"  # of a run that went on from another's
FREE = {  # what a branch may have otherwise: none of it changes what came before
    *("optim.schedule", "optim.decay_fraction", "optim.final_fraction", "optim.tokens"),
    *("run.micro_batch_rows", "run.validations", "run.checkpoints", "run.report_to", "run.divergence"),
}


def stored(settings: PretrainSettings) -> dict[str, Any]:
    """Settings as nested dicts that go into JSON; where files are is not part of what a run is."""
    given = asdict(settings)
    given["data"]["files"] = [Path(name).name for name in given["data"]["files"]]
    return json.loads(json.dumps(given))


def differing(given: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Names, as ``table.field``, of what two results of `stored` differ in; what the older lacks has its default."""
    plain = asdict(PretrainSettings(DataSettings(("any",))))
    return [
        f"{table}.{name}"
        for table, values in given.items()
        for name, value in values.items()
        if value != there.get(table, {}).get(name, plain[table].get(name))
    ]


def adopt(checkpoint: Path, settings: PretrainSettings, out: Path) -> Path:
    """Copy another run's checkpoint into the folder of a new one, which can then go on from it.

    Raises
    ------
    ValueError
        The checkpoint is not whole; its run had other settings than the schedule; by the new schedule the rate would
        not have been the same up to there.
    """
    if not is_complete(checkpoint):
        raise ValueError(f"{checkpoint} is no whole checkpoint: give a folder checkpoint-STEP of a run")
    there = json.loads((checkpoint.parent / SETTINGS).read_text(encoding="utf-8"))
    changed = [name for name in differing(stored(settings), there) if name not in FREE and name[:7] != "labels."]
    if changed:
        raise ValueError(f"a run cannot go on from {checkpoint} with another {', '.join(changed)}")
    step, optim = int(checkpoint.name.rpartition("-")[2]), settings.optim
    decay = round(optim.decay_fraction * optim.steps) if optim.schedule == "wsd" else 0
    # Of the schedules wsd alone begins like a constant one, and with another end it would warm up from another rate.
    same = optim.schedule == "constant" or (optim.schedule == "wsd" and optim.final_fraction == 0)
    if there["optim"]["schedule"] != "constant" or not same or step > optim.steps - decay:
        raise ValueError(
            f"a run that goes on from {checkpoint} needs the rate of that run up to step {step}: go on from a run with "
            f"schedule = 'constant', with 'wsd', final_fraction = 0 and at least as many steps before the decay "
            f"(here: {optim.schedule!r}, final_fraction {optim.final_fraction:g}, decay from {optim.steps - decay})"
        )
    made, partial = out / checkpoint.name, out / "adopted.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    (out / BRANCH).write_text(json.dumps({"step": step}), encoding="utf-8")
    partial.replace(made)
    return made


def branched_at(out: Path) -> int | None:
    """The step from which a run went on from another one."""
    place = out / BRANCH
    return int(json.loads(place.read_text(encoding="utf-8"))["step"]) if place.is_file() else None
