"""A sweep skips what is finished, tries again what crashed, and keeps what diverged."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mea.records import make_record, write_record
from mea.train.pretraining import sweep as sweeps
from mea.train.pretraining.settings import settings_from
from mea.train.pretraining.sweep import on_ray, run_command, sweep
from mea.train.pretraining.sweep_file import read_sweep
from tiny_corpus import SEPARATOR, some_documents

SWEEP = """
[data]
files = ["elsewhere"]
separator = "{separator}"
vocabulary = 300

[arms.frozen]
model = {{ variant = "mea", freeze_mixing = "random" }}

[[stage]]
arms = ["mea", "frozen"]
learning_rates = [1e-3, 1]
seeds = [0]

[[stage]]
arms = ["mea"]
learning_rates = [1e-3]
seeds = [0, 1]

[[stage]]
arms = ["mea"]
learning_rates = [1e-3]
seeds = [0]
branch = 0.8
change = {{ optim = {{ schedule = "cosine" }} }}
"""


@pytest.fixture
def runs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(SEPARATOR.join(some_documents()), encoding="utf-8")
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(separator=SEPARATOR.replace("\n", "\\n")), encoding="utf-8")
    return read_sweep(path, [str(text)])


def fake(outcomes: dict[str, list[str]], calls: list[str]):
    """A launcher that plays what should happen to a run, attempt after attempt, and notes what it was asked."""

    def launch(command: list[str], log: str) -> int:
        tables, folder, _cache, record = command[3:7]
        name = record.rpartition("/")[2].removesuffix(".json")
        calls.append(name)
        outcome = outcomes.get(name, ["good"])[calls.count(name) - 1]
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{outcome} in {folder}\n")
        if outcome == "crash":
            return -9
        if outcome == "interrupt":
            raise KeyboardInterrupt
        loss = {"validation_loss": None if outcome == "diverged" else 2.0}
        results = {"diverged": outcome == "diverged", "reason": "loss nan", "seconds_of_last_start": 1.0, **loss}
        write_record(record, make_record("pretraining", json.loads(tables), results=results))
        return 0

    return launch


def test_the_order_is_that_of_the_stages_and_nothing_comes_twice(runs):
    assert [run.name for run in runs] == [
        "mea-0.001-0",
        "frozen-0.001-0",
        "mea-1-0",
        "frozen-1-0",
        "mea-0.001-1",
        "mea-0.001-0-cosine",
    ]
    frozen = runs[1].tables
    assert frozen["model"] == {"variant": "mea", "freeze_mixing": "random"}
    assert (frozen["labels"], frozen["run"]) == ({"arm": "frozen"}, {"seed": 0})
    assert runs[-1].tables["optim"] == {"schedule": "cosine", "learning_rate": 1e-3}
    assert (runs[-1].base, runs[-1].branch) == ("mea-0.001-0", 0.8)


def test_finished_runs_are_skipped_crashed_ones_tried_again(runs, tmp_path):
    calls, notes = [], []
    outcomes = {
        "frozen-0.001-0": ["crash", "good"],
        "mea-1-0": ["diverged"],
        "frozen-1-0": ["crash", "crash", "crash", "good"],
    }
    launch = fake(outcomes, calls)
    counts = sweep(runs, tmp_path / "records", tmp_path / "work", launch=launch, note=notes.append)
    assert counts == {"finished": 5, "diverged": 1, "failed": 1, "left": 0}
    assert calls.count("frozen-0.001-0") == 2
    assert calls.count("frozen-1-0") == 3
    assert any("frozen-1-0 failed 3 times: crash in" in note and "exit code -9" in note for note in notes)
    assert any("mea-1-0: diverged (loss nan)" in note for note in notes)
    assert [p.name for p in (tmp_path / "work" / "runs").iterdir()] == ["frozen-1-0"]

    calls.clear()
    outcomes["frozen-1-0"] = ["good"]
    counts = sweep(runs, tmp_path / "records", tmp_path / "work", launch=launch, note=notes.append)
    assert calls == ["frozen-1-0"]
    assert counts["finished"] == 6


def test_an_interruption_starts_nothing_more(runs, tmp_path):
    calls = []
    play = fake({"frozen-0.001-0": ["interrupt"]}, calls)

    def launch(command: list[str], log: str) -> int:
        if "frozen-0.001-0" not in command[6]:
            time.sleep(1)  # longer than the sweep takes to notice, on a busy machine too
        return play(command, log)

    with pytest.raises(KeyboardInterrupt):
        sweep(runs, tmp_path / "records", tmp_path / "work", launch=launch, note=lambda _: None)
    assert len(calls) < 4
    counts = sweep(runs, tmp_path / "records", tmp_path / "work", launch=fake({}, []), note=lambda _: None)
    assert counts["finished"] == 6


def test_after_the_time_is_over_no_run_is_started(runs, tmp_path):
    counts = sweep(runs, tmp_path / "records", tmp_path / "work", minutes=0.0, launch=fake({}, []))
    assert counts == {"finished": 0, "diverged": 0, "failed": 0, "left": 6}


def test_a_branch_waits_for_the_run_that_it_goes_on_from(runs, tmp_path):
    """With two workers it began beside that run, found nothing kept, and was trained whole in five times the time."""
    happened = []

    def launch(command: list[str], log: str) -> int:
        branch = "cosine" in command[3]
        happened.append(branch)
        time.sleep(0 if branch else 0.5)
        happened.append(branch)
        return fake({}, [])(command, log)

    sweep([runs[0], runs[-1]], tmp_path / "records", tmp_path / "work", workers=2, launch=launch, note=lambda _: None)
    assert happened == [False, False, True, True]


def test_the_steps_of_runs_that_go_on_are_told(monkeypatch, runs, tmp_path):
    """A run takes minutes to days: a bar that moved only when one ends would say nothing for as long."""
    monkeypatch.setattr(sweeps, "POLL_SECONDS", 0.01)
    told, seen = [], threading.Event()

    def launch(command: list[str], log: str) -> int:
        Path(command[4], sweeps.STEPS).write_text("7")
        assert seen.wait(60)
        return fake({}, [])(command, log)

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if done == 7:
            seen.set()

    sweep(runs[:2], tmp_path / "records", tmp_path / "work", launch=launch, progress=progress, note=lambda _: None)
    steps = [settings_from(run.tables).optim.steps for run in runs[:2]]
    told = [entry for entry in told if entry[0].startswith("steps")]
    assert ("steps (0 of 2 runs have a record)", 7, sum(steps)) in told
    assert told[-1] == ("steps (2 of 2 runs have a record)", sum(steps), sum(steps))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("learning_rates = [1e-3, 1]", ""), r"sweep.toml: \[stage 1\] lacks learning_rates"),
        (
            ("learning_rates = [1e-3, 1]", "rates = [1e-3, 1]"),
            r"\[stage 1\] has no 'rates'; known are arms, learning_rates",
        ),
        (('arms = ["mea", "frozen"]', 'arms = ["mae"]'), "run mae-0.001-0: no variant is called 'mae'"),
        (("[[stage]]", "[[stages]]"), r"has no \[\[stage\]\]"),
        (("[arms.frozen]", "[arms]"), "arms.model.variant must be a valid table"),
        (('arms = ["mea", "frozen"]', "arms = 5"), "stage 1.arms must be a valid list, not 5"),
        (("seeds = [0, 1]", "seeds = [0, -1]"), "stage 2.seeds 2 must be greater than or equal to 0, not -1"),
        (("seeds = [0, 1]", "seeds = []"), "stage 2.seeds: .* at least 1 item"),
        (("branch = 0.8", "branch = 7"), "stage 3.branch must be less than 1, not 7"),
        (("branch = 0.8", "brunch = 0.8"), r"\[stage 3\] has no 'brunch'.*did you mean 'branch'"),
        (("[data]", "keep = 2\n[data]"), "keep must be less than 1, not 2"),
        (("[data]", "data = 3\n[optim]"), "data must be a valid table, not 3"),
        (('change = {{ optim = {{ schedule = "cosine" }} }}', "change = 3"), "stage 3.change must be a valid table"),
        (("learning_rates = [1e-3, 1]", "learning_rates = [1.0000001, 1]"), "would both be called mea-1-0"),
    ],
)
def test_a_sweep_file_that_is_wrong(tmp_path, change, message):
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.replace(*change).format(separator="x"), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_sweep(path)


def test_one_stage_table_is_no_list_of_stages(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('[stage]\narms = ["mea"]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no \[\[stage\]\]"):
        read_sweep(path)


@pytest.mark.parametrize("arm", ["../../x", "/x", "..", "a/b", "a\\\\b", ".hidden", "a\\u001bb", "x" * 101])
def test_an_arm_names_no_file_elsewhere(tmp_path, arm):
    path = tmp_path / "sweep.toml"
    text = SWEEP.replace("arms.frozen", f'arms."{arm}"').replace('"frozen"', f'"{arm}"')
    path.write_text(text.format(separator="x"), encoding="utf-8")
    with pytest.raises(ValueError, match="an arm cannot be called"):
        read_sweep(path)


def test_a_command_adds_to_its_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    assert run_command([sys.executable, "-c", "print('out'); raise SystemExit(3)"], str(log)) == 3
    assert log.read_text() == "before\nout\n"


def test_runs_at_a_time_share_the_threads(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(sweeps.torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(sweeps, "WORKER", "import os; raise SystemExit('threads ' + os.environ['OMP_NUM_THREADS'])")
    notes = []
    sweep(runs[:1], tmp_path / "records", tmp_path / "work", workers=2, attempts=1, note=notes.append)
    assert "threads 3" in notes[0]


def test_ray_is_asked_for_by_name_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="pip install ray"):
        on_ray(1.0)


class StandInForRay(SimpleNamespace):
    """What is asked of Ray's interface; each task is run here and now, or its worker dies."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, dies: bool = False) -> None:
        super().__init__(asked=[], dies=dies)

    def init(self, **_) -> None:
        pass

    def remote(self, **options):
        self.asked.append(options)
        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def get(self, task):
        if self.dies:
            raise self.exceptions.RayError("the worker died")
        return task[0](*task[1])


def test_ray_is_given_the_same_command(monkeypatch, tmp_path):
    ray = StandInForRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert on_ray(0.5)([sys.executable, "-c", "print(1)"], str(tmp_path / "log.txt")) == 0
    assert ray.asked == [{"num_cpus": 1, "num_gpus": 0.5, "max_retries": 0}]


def test_a_node_of_the_cluster_that_dies_is_a_crash_of_its_run(monkeypatch, runs, tmp_path):
    """Ray raises then, which ended the whole sweep; the run is to be tried again, as after any crash."""
    monkeypatch.setitem(sys.modules, "ray", StandInForRay(dies=True))
    notes = []
    counts = sweep(runs[:2], tmp_path / "records", tmp_path / "work", launch=on_ray(0.0), note=notes.append)
    assert counts["failed"] == 2
    assert all("failed 3 times: the worker died" in note for note in notes)
