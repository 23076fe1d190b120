"""Many runs, as one thing that can be stopped and gone on with at any moment.

A run is done when its record is there. Each runs in a process of its own: one that crashes takes no other with it.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mea.records import Progress, read_record
from mea.train.checkpoints import is_complete
from mea.train.pretraining.branch import SETTINGS
from mea.train.pretraining.dataset import prepare
from mea.train.pretraining.run import KIND
from mea.train.pretraining.settings import settings_from
from mea.train.pretraining.sweep_file import Job

KEPT = "kept"  # of the work folder, for checkpoints that branches start from
STEPS = "steps"  # of a run's folder: how many it has done
LOOK = 2.0  # seconds after which the sweep looks how far its runs are
Launch = Callable[[list[str], str], int]
# The command that does one run; the arguments are the run's settings as JSON, its folder, the cache and the record.
WORKER = "from mea.train.pretraining.sweep import work; import sys; work(*sys.argv[1:])"


def sweep(
    jobs: list[Job],
    results: str | Path,
    work_folder: str | Path,
    *,
    workers: int = 1,
    attempts: int = 3,
    minutes: float | None = None,
    progress: Progress | None = None,
    launch: Launch | None = None,
    note: Callable[[str], None] = print,
) -> dict[str, int]:
    """Do the runs that have no record yet.

    Parameters
    ----------
    jobs
        From `read_jobs`.
    results
        Folder of the records; ``NAME.json`` each.
    work_folder
        Tokenised data and the folders of unfinished runs; a run's is removed when its record is there.
    workers
        Processes at a time, on this machine; its threads are shared out among them.
    attempts
        Of a run that crashes; each goes on from the last checkpoint.
    minutes
        Start no run after so many.
    launch
        Runs a command, its output added to a file, and returns its exit code; None for a process on this machine.
    progress
        Called with what is done, how much of it and how much there is: steps, those of all runs that had no record.
    note
        Told of every run's end.

    Returns
    -------
    Numbers of runs that are ``finished`` (before or now), of these ``diverged``, ``failed`` and ``left``.
    """
    results, work_folder = Path(results).absolute(), Path(work_folder).absolute()
    todo = [job for job in jobs if not (results / f"{job.name}.json").is_file()]
    if todo:
        for tables in _distinct_data(todo):  # once, before processes would do it side by side
            prepare(settings_from(tables).data, work_folder / "data", progress)
    if launch is None:  # with all threads each, two runs on two cores took four times as long
        launch = partial(run_command, threads=max(1, torch.get_num_threads() // workers))
    start, failed, done = time.monotonic(), [], 0
    stopping = threading.Event()

    def run(job: Job, base: Future | None) -> str | None:
        if base is not None:
            base.exception()  # ended, well or not: what it kept is where the branch starts
        late = minutes is not None and time.monotonic() - start > 60 * minutes
        return None if late else _attempt(job, results, work_folder, attempts, launch, stopping)

    steps = {job.name: settings_from(job.tables).optim.steps for job in todo}
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future, Job] = {}
        begun: dict[str, Future] = {}  # runs are begun in this order: waiting for one before never ends in waiting
        for job in todo:
            begun[job.name] = pool.submit(run, job, begun.get(job.base) if job.branch is not None else None)
            futures[begun[job.name]] = job
        pending = set(futures)
        try:
            while pending:
                ended, pending = wait(pending, LOOK, FIRST_COMPLETED)
                for future in ended:
                    job, error = futures[future], future.result()
                    if error:
                        failed.append(job.name)
                        note(f"{job.name} failed {attempts} times: {error}")
                    elif (results / f"{job.name}.json").is_file():
                        done += 1
                        note(f"{job.name}: {_outcome(results / f'{job.name}.json')}")
                if progress:
                    over = sum(steps[futures[future].name] for future in futures.keys() - pending)
                    over += sum(_steps_done(work_folder / "runs" / futures[future].name) for future in pending)
                    what = f"steps ({len(jobs) - len(todo) + done} of {len(jobs)} runs have a record)"
                    progress(what, over, sum(steps.values()))
        except BaseException:  # an interruption too: start nothing more, and nothing again
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    there = [results / f"{job.name}.json" for job in jobs if (results / f"{job.name}.json").is_file()]
    diverged = sum(bool(read_record(path)["results"]["diverged"]) for path in there)
    left = len(jobs) - len(there) - len(failed)
    return {"finished": len(there), "diverged": diverged, "failed": len(failed), "left": left}


def work(tables: str, folder: str, cache: str, record: str, start_from: str | None = None) -> None:
    """What one process of a sweep does."""
    from mea.train.pretraining.run import pretrain

    def tell(what: str, done: int, _total: int) -> None:
        if what.startswith(STEPS):
            Path(folder, STEPS).write_text(str(done), encoding="utf-8")

    settings = settings_from(json.loads(tables))
    pretrain(settings, folder, cache=cache, record=record, start_from=start_from, progress=tell)


def _steps_done(folder: Path) -> int:
    """How far a run is: none if it has not begun, or is just being written about."""
    try:
        return int((folder / STEPS).read_text(encoding="utf-8") or 0)
    except FileNotFoundError:
        return 0


def _distinct_data(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    seen = set()
    for job in jobs:
        key = json.dumps(job.tables.get("data"), sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield job.tables


def run_command(command: list[str], log: str, threads: int | None = None) -> int:
    """Run a command with its output added to a file, and so many threads if given; return its exit code."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=environment).returncode


def on_ray(gpus: float) -> Launch:
    """Run each command somewhere on a Ray cluster, with so many GPUs; its nodes must share the folders of the sweep.

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
    job: Job, results: Path, work_folder: Path, attempts: int, launch: Launch, stopping: threading.Event
) -> str | None:
    """Run a job until its record is there; the last line of what it said if it never was."""
    record, folder = results / f"{job.name}.json", work_folder / "runs" / job.name
    arguments = [json.dumps(job.tables), str(folder), str(work_folder / "data"), str(record)]
    log, error = folder / "log.txt", ""
    if job.branch is not None:
        start = work_folder / KEPT / job.base / _checkpoint(job, job.branch)
        arguments += [str(start)] if is_complete(start) else []
    for _ in range(attempts):
        if stopping.is_set():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        code = launch([sys.executable, "-c", WORKER, *arguments], str(log))
        if code == 0 and record.is_file():
            if job.keep is not None:
                _keep(folder, _checkpoint(job, job.keep), work_folder / KEPT / job.name)
            shutil.rmtree(folder)
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = f"{lines[-1] if lines else 'no output'} (exit code {code}; all of it is in {log})"
    return error


def _checkpoint(job: Job, share: float) -> str:
    """Name of the checkpoint after a share of a run's steps."""
    return f"checkpoint-{round(share * settings_from(job.tables).optim.steps)}"


def _keep(run: Path, checkpoint: str, place: Path) -> None:
    """Move a checkpoint of a finished run, if it is still there, to where branches look for it."""
    if is_complete(run / checkpoint):
        place.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place / checkpoint, ignore_errors=True)
        shutil.copyfile(run / SETTINGS, place / SETTINGS)
        shutil.move(run / checkpoint, place / checkpoint)


def _outcome(path: Path) -> str:
    record = read_record(path)
    if record["kind"] != KIND:
        raise ValueError(f"{path} is no record of a run, but of the kind {record['kind']!r}")
    results = record["results"]
    if results["diverged"]:
        return f"diverged ({results['reason']})"
    return f"validation loss {results['validation_loss']:.4f} in {results['seconds_of_last_start']:,.0f} s"
