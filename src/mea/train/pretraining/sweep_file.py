"""The runs of a sweep: what its file says, as a list of names and settings."""

import copy
import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mea.train.pretraining.settings import read_toml, settings_from


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its name, and its settings as nested tables.

    Parameters
    ----------
    base, branch
        The run from whose kept checkpoint, after this share of the steps, it goes on; it is done from the beginning if
        there is none.
    keep
        After which share of the steps a checkpoint is kept.
    """

    name: str
    tables: dict[str, Any]
    base: str = ""
    branch: float | None = None
    keep: float | None = None


def read_jobs(path: str | Path, files: list[str] | None = None) -> list[Job]:
    """The runs of a sweep file, in the order in which they are to be done.

    The tables ``data``, ``model``, ``optim`` and ``run`` are what all runs share. Each ``[[stage]]`` has ``arms``,
    ``rates`` and ``seeds``. An arm is the name of an ``[arms.NAME]`` table, which holds what it changes; without such
    a table it is the variant of that name. A stage's ``change`` holds more tables, for all its runs; with ``branch``,
    a share of the steps, each of them goes on there from the run without the change, if that run's checkpoint was kept:
    ``keep`` at the top of a sweep file keeps those after such a share. Stages come one after the other, in each the
    seeds, in these the rates, in these the arms; a run named twice is one run.

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
        raise ValueError(f"{path} has no [[stage]] with arms, rates and seeds")
    if files:
        tables.setdefault("data", {})["files"] = files
    jobs: dict[str, Job] = {}
    for number, stage in enumerate(stages, 1):
        missing = [name for name in ("arms", "rates", "seeds") if not stage.get(name)]
        if missing:
            raise ValueError(f"{path}: stage {number} lacks {', '.join(missing)}")
        for seed, rate, arm in itertools.product(stage["seeds"], stage["rates"], stage["arms"]):
            job = _job(tables, arm, arms.get(arm, {"model": {"variant": arm}}), rate, seed, stage.get("change", {}))
            job = replace(job, branch=stage.get("branch"), keep=keep)
            try:
                settings_from(job.tables)
            except ValueError as error:
                raise ValueError(f"{path}, run {job.name}: {error}") from error
            jobs.setdefault(job.name, job)
    return list(jobs.values())


def _job(tables: dict[str, Any], arm: str, changes: dict[str, Any], rate: int | float, seed: int, more: dict) -> Job:
    made = copy.deepcopy(tables)
    for source in (changes, more):
        for table, values in source.items():
            made.setdefault(table, {}).update(copy.deepcopy(values))
    made.setdefault("optim", {})["learning_rate"] = float(rate)
    made.setdefault("run", {})["seed"] = seed
    made.setdefault("labels", {})["arm"] = arm
    suffix = f"-{_short(more)}" if more else ""
    base = f"{arm}-{rate:g}-{seed}"
    return Job(f"{base}{suffix}", made, base)


def _short(changes: dict[str, Any]) -> str:
    """A stage's changes in a run's name: the schedule if that is what changes, else a hash."""
    schedule = changes.get("optim", {}).get("schedule")
    digest = hashlib.blake2b(json.dumps(changes, sort_keys=True).encode(), digest_size=3).hexdigest()
    return schedule or digest
