"""A sweep of runs; an interrupted sweep continues.

A run is done when its record exists. Every run has its own process, so a crash does not affect the others.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mea.ops.device import use_device
from mea.records import Progress, read_record
from mea.train.checkpoints import is_complete
from mea.train.pretraining.branch import SETTINGS
from mea.train.pretraining.record import KIND, end_message
from mea.train.pretraining.settings import settings_from
from mea.train.pretraining.sweep_file import SweepRun
from mea.train.pretraining.tokenise import prepare

STEPS = "steps"  # file in a run's folder: how many it has done
POLL_SECONDS = 2.0  # between looks at how many steps the runs have done
Launch = Callable[[list[str], str], int]
# The command that does one run; the arguments are the run's settings as JSON, its folder, the cache, the record and the
# device.
WORKER = "from mea.train.pretraining.sweep import work; import sys; work(*sys.argv[1:])"


@dataclass(frozen=True)
class Folders:
    """The folders of a sweep."""

    results: Path
    work: Path

    @property
    def data(self) -> Path:
        """Tokenised data."""
        return self.work / "data"

    def record(self, run: SweepRun) -> Path:
        """The record that says that a run is done."""
        return self.results / f"{run.name}.json"

    def run(self, run: SweepRun) -> Path:
        """The folder of an unfinished run."""
        return self.work / "runs" / run.name

    def kept(self, name: str) -> Path:
        """Checkpoints of the run of this name that branches start from."""
        return self.work / "kept" / name


def sweep(
    runs: list[SweepRun],
    results: str | Path,
    work_folder: str | Path,
    *,
    workers: int = 1,
    attempts: int = 3,
    minutes: float | None = None,
    progress: Progress | None = None,
    launch: Launch | None = None,
    device: str = "auto",
    note: Callable[[str], None] = print,
) -> dict[str, int]:
    """Do the runs without a record; return how many ``finished``, of these ``diverged``, ``failed`` and are ``left``.

    Parameters
    ----------
    results
        Folder of the records; ``NAME.json`` each.
    work_folder
        Folder of tokenised data and of unfinished runs; a run's folder is removed when its record exists.
    workers
        Number of parallel processes on this machine, which divide its threads among them.
    attempts
        Attempts at a run that crashes; each continues from the last checkpoint.
    minutes
        Minutes after which no new run starts.
    launch
        Runs a command, its output added to a file, and returns its exit code; None for a process on this machine.
    device
        Device of each run, as in `mea.ops.device.use_device`.
    note
        Called at the end of every run.
    """
    folders = Folders(Path(results).absolute(), Path(work_folder).absolute())
    todo = [run for run in runs if not folders.record(run).is_file()]
    for tables in _distinct_data(todo):  # once, before processes would do it side by side
        data = settings_from(tables).data
        if data.recall is None:
            prepare(data, folders.data, progress)
    if launch is None:  # with all threads each, two runs on two cores took four times as long
        launch = partial(run_command, threads=max(1, torch.get_num_threads() // workers))
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    stopping = threading.Event()

    def carry_out(run: SweepRun, base: Future | None) -> str | None:
        if base is not None:
            base.exception()  # ended, well or not: what it kept is where the branch starts
        return None if time.monotonic() > deadline else _attempt(run, folders, device, attempts, launch, stopping)

    with ThreadPoolExecutor(workers) as pool:
        begun: dict[str, Future] = {}  # runs are begun in this order: waiting for one before never ends in waiting
        for run in todo:
            base = begun.get(run.base) if run.branch is not None else None
            begun[run.name] = pool.submit(carry_out, run, base)
        try:
            failed = _follow(dict(zip(begun.values(), todo, strict=True)), folders, len(runs), progress, note)
        except BaseException:  # an interruption too: start nothing more, and nothing again
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    records = [read_record(folders.record(run)) for run in runs if folders.record(run).is_file()]
    diverged = sum(bool(record["results"]["diverged"]) for record in records)
    left = len(runs) - len(records) - failed
    return {"finished": len(records), "diverged": diverged, "failed": failed, "left": left}


def _follow(
    futures: dict[Future, SweepRun],
    folders: Folders,
    total_runs: int,
    progress: Progress | None,
    note: Callable[[str], None],
) -> int:
    """Wait for all runs, report steps and ends; return how many failed."""
    steps = {run.name: settings_from(run.tables).optim.steps for run in futures.values()}
    pending, failed, done = set(futures), 0, total_runs - len(futures)
    while pending:
        ended, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
        for future in ended:
            run, error = futures[future], future.result()
            if error:
                failed += 1
                note(f"{run.name} {error}")
            elif folders.record(run).is_file():
                done += 1
                note(f"{run.name}: {_outcome(folders.record(run))}")
        if progress:
            steps_done = sum(steps[futures[future].name] for future in futures.keys() - pending)
            steps_done += sum(_steps_done(folders.run(futures[future])) for future in pending)
            progress(f"steps ({done} of {total_runs} runs have a record)", steps_done, sum(steps.values()))
    return failed


def work(
    tables: str, folder: str, cache: str, record: str, device: str = "auto", start_from: str | None = None
) -> None:
    """Do one run of a sweep, in a process of its own."""
    from mea.train.pretraining.run import pretrain

    def tell(what: str, done: int, _total: int) -> None:
        if what.startswith(STEPS):
            Path(folder, STEPS).write_text(str(done), encoding="utf-8")

    use_device(device)
    settings = settings_from(json.loads(tables))
    pretrain(settings, folder, cache=cache, record=record, start_from=start_from, progress=tell)


def _steps_done(folder: Path) -> int:
    """Steps that a run has done; 0 if it has not begun, or the file is just being written."""
    try:
        return int((folder / STEPS).read_text(encoding="utf-8") or 0)
    except FileNotFoundError:
        return 0


def _distinct_data(runs: list[SweepRun]) -> list[dict[str, Any]]:
    return list({json.dumps(run.tables.get("data"), sort_keys=True): run.tables for run in runs}.values())


def run_command(command: list[str], log: str, threads: int | None = None) -> int:
    """Run a command with its output added to a file, and so many threads if they are given; return its exit code."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=environment).returncode


def on_ray(gpus: float) -> Launch:
    """Run commands on a Ray cluster, each with this many GPUs; its nodes must share the folders of the sweep.

    Raises
    ------
    ImportError
        Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("a sweep on a cluster needs Ray (pip install ray); without it runs are local") from error
    ray.init(address="auto", ignore_reinit_error=True)
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_command)

    def launch(command: list[str], log: str) -> int:
        try:
            return ray.get(remote.remote(command, log))
        except ray.exceptions.RayError as error:  # the node or its worker died: a crash of this run, not of the sweep
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{error}\n")
            return 1

    return launch


def _attempt(
    run: SweepRun, folders: Folders, device: str, attempts: int, launch: Launch, stopping: threading.Event
) -> str | None:
    """Launch a run until its record is there; what to say of it, with the last line of its log, if it never was."""
    record, folder = folders.record(run), folders.run(run)
    arguments = [json.dumps(run.tables), str(folder), str(folders.data), str(record), device]
    log, error = folder / "log.txt", ""
    if run.branch is not None:
        start = folders.kept(run.base) / _checkpoint(run, run.branch)
        arguments += [str(start)] if is_complete(start) else []
    for _ in range(attempts):
        if stopping.is_set():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        code = launch([sys.executable, "-c", WORKER, *arguments], str(log))
        if code == 0 and record.is_file():
            if run.keep is not None:
                _keep(folder, _checkpoint(run, run.keep), folders.kept(run.name))
            shutil.rmtree(folder)
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = f"{lines[-1] if lines else 'no output'} (exit code {code}; all of it is in {log})"
    return f"failed {attempts} times: {error}"


def _checkpoint(run: SweepRun, share: float) -> str:
    """Name of the checkpoint after a share of a run's steps."""
    return f"checkpoint-{round(share * settings_from(run.tables).optim.steps)}"


def _keep(folder: Path, checkpoint: str, kept: Path) -> None:
    """Move a checkpoint of a finished run, if it is still there, to where branches look for it."""
    if is_complete(folder / checkpoint):
        kept.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(kept / checkpoint, ignore_errors=True)
        shutil.copyfile(folder / SETTINGS, kept / SETTINGS)
        shutil.move(folder / checkpoint, kept / checkpoint)


def _outcome(path: Path) -> str:
    record = read_record(path)
    if record["kind"] != KIND:
        raise ValueError(f"{path} is no record of a run, but of the kind {record['kind']!r}")
    results = record["results"]
    if results["diverged"]:
        return f"diverged ({results['reason']})"
    return f"{end_message(record)} in {results['seconds_of_last_start']:,.0f} s"
