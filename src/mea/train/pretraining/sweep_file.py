"""A sweep's TOML file as a list of runs."""

import copy
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from mea.train.pretraining.settings import read_toml, settings_from
from mea.train.settings import CONFIG, Names, Positive, Seed, Share, Table, build

Tables = dict[str, Any]
# Names of arms become names of files and folders.
NAME = re.compile(r"\w[\w .+-]{0,99}")


@checked(frozen=True, config=CONFIG)
class Stage:
    """One ``[[stage]]`` of a sweep file; `read_sweep` explains the fields."""

    arms: Annotated[Names, Field(min_length=1)]
    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    branch: Share | None = None
    change: dict[str, Table] = field(default_factory=dict)


@checked(frozen=True, config=CONFIG)
class SweepFile:
    """A sweep file but for the tables of `PretrainSettings`, which are checked run by run."""

    stage: Annotated[tuple[Stage, ...], Field(min_length=1)]
    arms: dict[str, dict[str, Table]] = field(default_factory=dict)
    keep: Share | None = None
    data: Table = field(default_factory=dict)
    model: Table = field(default_factory=dict)
    optim: Table = field(default_factory=dict)
    run: Table = field(default_factory=dict)
    labels: Table = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its name, and its settings as nested tables.

    Parameters
    ----------
    base, branch
        The run whose checkpoint after this share of the steps this run continues; without that checkpoint it is trained
        from the beginning.
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
    ``branch``, a share of the steps, each run starts at this step from the checkpoint of the run without the change, if
    that was kept: ``keep`` at the top of a sweep file keeps checkpoints after such a share. The order is by stage, then
    seed, then learning rate, then arm; a run named twice is one run.

    Parameters
    ----------
    path
        TOML.
    files
        Replace ``data.files``: where the text is on this machine.

    Raises
    ------
    ValueError
        A table is missing or wrong, or a run's settings are not valid; the message names the run.
    """
    content = read_toml(path)
    if not isinstance(content.get("stage"), list):
        raise ValueError(f"{path} has no [[stage]] with arms, learning_rates and seeds")
    try:
        sweep = build(SweepFile, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shared = {name: getattr(sweep, name) for name in ("data", "model", "optim", "run", "labels")}
    if files:
        shared["data"] = shared["data"] | {"files": files}
    runs: dict[str, SweepRun] = {}
    for stage in sweep.stage:
        for seed, lr, arm in itertools.product(stage.seeds, stage.learning_rates, stage.arms):
            if not NAME.fullmatch(arm):
                raise ValueError(
                    f"{path}: an arm cannot be called {arm!r}: arms name files, so give up to 100 letters, digits, "
                    "spaces and _ . + -, with a letter, digit or _ first"
                )
            tables = _tables(shared, arm, sweep.arms.get(arm, {"model": {"variant": arm}}), lr, seed, stage.change)
            base = f"{arm}-{lr:g}-{seed}"
            name = base + (f"-{_short(stage.change)}" if stage.change else "")
            try:
                settings_from(tables)
            except ValueError as error:
                raise ValueError(f"{path}, run {name}: {error}") from error
            run = runs.setdefault(name, SweepRun(name, tables, base, stage.branch, sweep.keep))
            if run.tables != tables:
                raise ValueError(f"{path}: two runs that differ would both be called {name}")
    return list(runs.values())


def _tables(shared: Tables, arm: str, arm_changes: Tables, lr: float, seed: int, stage_changes: Tables) -> Tables:
    """The settings of one run."""
    tables = copy.deepcopy(shared)
    for changes in (arm_changes, stage_changes):
        for table, values in changes.items():
            tables.setdefault(table, {}).update(copy.deepcopy(values))
    tables["optim"]["learning_rate"] = float(lr)
    tables["run"]["seed"] = seed
    tables["labels"]["arm"] = arm
    return tables


def _short(changes: Tables) -> str:
    """A stage's changes in a run's name: the schedule if that is what changes, else a hash."""
    schedule = changes.get("optim", {}).get("schedule")
    digest = hashlib.blake2b(json.dumps(changes, sort_keys=True).encode(), digest_size=3).hexdigest()
    return schedule or digest
