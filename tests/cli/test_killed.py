"""Commands that are killed at random moments and started again end with the files of an undisturbed run."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from malformed import toml
from tiny_corpus import SEPARATOR, some_documents

DATA = Path(__file__).parents[1] / "evaluate" / "data"
COMMANDS = ("compress", "recover", "eval", "sweep", "pretrain")
PATHS = {"training_args.bin", "complete.json"}  # hold the folder's path, and a checksum of the other
# Words of the names in records that tell of times, and of checkpoints that a kill left incomplete.
TIMES = {"seconds", "date", "commit", "incomplete"}
# Imports once. For every line a child of its own runs the command; with seconds it is killed after these.
SERVER = """
import json, os, signal, sys, time
import mea.compression.save, mea.evaluate.runner, mea.train.pretraining.sweep, mea.train.recovery.save
from mea.cli import app
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for line in sys.stdin:
    arguments, seconds, log = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            app(arguments)
        finally:
            sys.stderr.flush()
    os.setpgid(child, child)  # before a kill; children of the child follow
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if seconds is not None and time.monotonic() - began > seconds:
            os.killpg(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)
    print(json.dumps([os.waitstatus_to_exitcode(ended[1]), time.monotonic() - began]), file=answers, flush=True)
"""
Run = Callable[..., tuple[int, float, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Exit code, seconds and standard error of a command, killed after some seconds if any are given."""
    log = tmp_path_factory.mktemp("log") / "log"
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    commands, answers = server.stdin, server.stdout
    assert commands
    assert answers

    def ask(arguments: list[Any], seconds: float | None = None) -> tuple[int, float, str]:
        log.write_text("")
        print(json.dumps([list(map(str, arguments)), seconds, str(log)]), file=commands, flush=True)
        code, took = json.loads(answers.readline())
        return code, took, log.read_text()

    yield ask
    commands.close()
    server.wait()


@pytest.fixture(scope="module")
def ground(models_: dict[str, str], run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What commands read: a model, a compressed one, texts, settings of training."""
    folder = tmp_path_factory.mktemp("ground")
    words, documents = folder / "words.txt", folder / "documents.txt"
    words.write_text(" ".join(f"w{i}" for i in torch.randint(60, (3000,)).tolist()), encoding="utf-8")
    documents.write_text(SEPARATOR.join(some_documents()), encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings: dict[str, Any] = {
        "data": {"files": [str(documents)], "separator": SEPARATOR, "vocabulary": 300, "validation_fraction": 0.1,
                 "validation_tokens": 512, "row": 32},
        "model": {"variant": "mea", "changes": {**sizes, "num_key_value_heads": 4}},
        "optim": {"tokens": 2560, "batch_tokens": 128, "warmup_tokens": 256},
        "run": {"validations": 2, "checkpoints": 4},
    }  # fmt: skip
    stage = {"arms": ["mea", "transformer"], "learning_rates": [0.01], "seeds": [0]}
    (folder / "run.toml").write_text(toml(settings))
    (folder / "sweep.toml").write_text(toml(settings | {"stage": [stage]}))
    calibrated = ["--calibration-tokens", 1024, "--calibration-window", 64, "--calibration-text", words]
    compress = ["compress", models_["a"], "--keep", 0.9, *calibrated, "--measure", 64]
    code, _, said = run([*compress[:2], folder / "packed", *compress[2:]])
    assert code == 0, said
    recover = ["--original", models_["a"], "--text", words, "--window", 16, "--batch", 2, "--micro-batch", 2]
    recover += ["--tokens", 256, "--held-out", 32, "--precision", "float32", "--measure", 64]
    evaluated = ["--task", "piqa", "--data", DATA, "--limit", 8]
    return {
        "compress": lambda out: [*compress[:2], out / "made", *compress[2:]],
        "recover": lambda out: ["recover", folder / "packed", out / "made", *recover],
        "eval": lambda out: ["eval", models_["a"], *evaluated, "--out", out / "made"],
        "sweep": lambda out: ["sweep", folder / "sweep.toml", out / "made", "--work", out / "work"],
        "pretrain": lambda out: ["pretrain", folder / "run.toml", out / "made", "--cache", out / "cache"],
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if not TIMES & set(name.split("_"))}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Files by path; of records and cards what does not differ from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in PATHS):
        name = str(path.relative_to(folder))
        found[name] = without_times(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes()
    return found


def whole_folder(made: Path) -> bool:
    """Whether a model is there, which the command refuses to write again."""
    return any((made / name).is_file() for name in ("compression.json", "recovery.json"))


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_started_again(command: str, kills: int, ground: dict[str, Any], run: Run, tmp_path: Path) -> None:
    chance = random.Random(f"{command} {kills}")
    code, whole, said = run(ground[command](tmp_path / "undisturbed"))
    assert code == 0, said
    expected, killed, again = contents(tmp_path / "undisturbed" / "made"), 0, ground[command](tmp_path / "killed")
    while killed < kills:
        code, _, said = run(again, chance.uniform(0, whole))
        assert code in (0, -9), said
        killed += code == -9
        if code == 0 or whole_folder(tmp_path / "killed" / "made"):  # it ended before, or was killed at its exit
            assert contents(tmp_path / "killed" / "made") == expected
            shutil.rmtree(tmp_path / "killed")
            whole *= 0.9
    code, _, said = run(again)
    assert code == 0, said
    assert contents(tmp_path / "killed" / "made") == expected
