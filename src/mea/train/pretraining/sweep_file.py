"""A sweep's TOML file as a list of runs."""

import copy
import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mea.train.pretraining.settings import read_toml, settings_from

Tables = dict[str, Any]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its name, and its settings as nested tables.

    Parameters
    ----------
    base, branch
        The run from whose kept checkpoint, after this share of the steps, it goes on; without that checkpoint it is
        trained from the beginning.
    keep
        Share of the steps after which a checkpoint is kept.
    """

    name: str
    tables: Tables
    base: str = ""
    branch: float | None = None
    keep: float | None = None


def read_sweep(path: str | Path, files: list[str] | None = None) -> list[SweepRun]:
    """The runs of a sweep file, in the order in which they are to be done.

    The tables ``data``, ``model``, ``optim`` and ``run`` are what all runs share. Each ``[[stage]]`` has ``arms``,
    ``learning_rates`` and ``seeds``. An arm is the name of an ``[arms.NAME]`` table, which holds what it changes;
    without such a table it is the variant of that name. A stage's ``change`` holds more tables, for all its runs. With
    ``branch``, a share of the steps, each run goes on there from the run without the change, if that run's checkpoint
    was kept: ``keep`` at the top of a sweep file keeps those after such a share. The order is by stage, then seed, then
    learning rate, then arm; a run named twice is one run.

    Parameters
    ----------
    path
        TOML.
    files
        Replace ``data.files``: where the text is on this machine.

    Raises
    ------
    ValueError
        A table is missing, or a run's settings are not valid; the message names the run.
    """
    tables = read_toml(path)
    stages, arms, keep = tables.pop("stage", None), tables.pop("arms", {}), tables.pop("keep", None)
    if not stages:
        raise ValueError(f"{path} has no [[stage]] with arms, learning_rates and seeds")
    if files:
        tables.setdefault("data", {})["files"] = files
    runs: dict[str, SweepRun] = {}
    for number, stage in enumerate(stages, 1):
        if "rates" in stage:
            raise ValueError(f"{path}: stage {number} has rates, which are called learning_rates now")
        missing = [name for name in ("arms", "learning_rates", "seeds") if not stage.get(name)]
        if missing:
            raise ValueError(f"{path}: stage {number} lacks {', '.join(missing)}")
        for seed, lr, arm in itertools.product(stage["seeds"], stage["learning_rates"], stage["arms"]):
            run = _run(tables, arm, arms.get(arm, {"model": {"variant": arm}}), lr, seed, stage.get("change", {}))
            run = replace(run, branch=stage.get("branch"), keep=keep)
            try:
                settings_from(run.tables)
            except ValueError as error:
                raise ValueError(f"{path}, run {run.name}: {error}") from error
            runs.setdefault(run.name, run)
    return list(runs.values())


def _run(shared: Tables, arm: str, arm_changes: Tables, lr: int | float, seed: int, stage_changes: Tables) -> SweepRun:
    tables = copy.deepcopy(shared)
    for changes in (arm_changes, stage_changes):
        for table, values in changes.items():
            tables.setdefault(table, {}).update(copy.deepcopy(values))
    tables.setdefault("optim", {})["learning_rate"] = float(lr)
    tables.setdefault("run", {})["seed"] = seed
    tables.setdefault("labels", {})["arm"] = arm
    base = f"{arm}-{lr:g}-{seed}"
    suffix = f"-{_short(stage_changes)}" if stage_changes else ""
    return SweepRun(base + suffix, tables, base)


def _short(changes: Tables) -> str:
    """A stage's changes in a run's name: the schedule if that is what changes, else a hash."""
    schedule = changes.get("optim", {}).get("schedule")
    digest = hashlib.blake2b(json.dumps(changes, sort_keys=True).encode(), digest_size=3).hexdigest()
    return schedule or digest
