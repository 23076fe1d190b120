"""Runs of a second: what they record, that they go on to the same losses, and what is said when something is wrong."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from mea.models.decoder import MeaForCausalLM
from mea.records import read_record
from mea.train.checkpoints import MARK, mark_complete
from mea.train.pretraining import run as pretraining
from mea.train.pretraining.record import divergence_message
from mea.train.pretraining.run import build_model, pretrain
from mea.train.pretraining.tokenise import prepare
from mea.train.pretraining.trainer import parameter_groups
from mea.train.trainer import disk_errors


def losses(record) -> dict:
    assert {"train_loss", "grad_norm", "validation_loss", "largest_logit", "value_mixing"} <= set(record["samples"])
    return record["samples"]


@pytest.fixture(scope="module")
def alone(settings, cache, tmp_path_factory):
    """A run that nothing disturbs, with its folder."""
    out = tmp_path_factory.mktemp("alone")
    return pretrain(settings(), out, cache=cache), out


def test_a_run_learns_and_records_every_step(alone):
    record, out = alone
    samples = record["samples"]
    assert len(samples["train_loss"]) == len(samples["grad_norm"]) == 20
    assert samples["validation_tokens"] == [0, 640, 1280, 1920, 2560]
    assert samples["train_loss"][-1] < samples["train_loss"][0]
    assert record["results"]["validation_loss"] == pytest.approx(samples["validation_loss"][-1], rel=1e-5)
    assert record["results"]["validation_loss"] < record["results"]["initial_loss"]
    assert read_record(out / "record.json") == record
    assert MeaForCausalLM.from_pretrained(out / "model").config.attention == "mea"


def test_resuming_from_any_checkpoint_gives_the_same_losses(alone, settings, cache, tmp_path):
    """Stopped in the middle by an exception, and the newest checkpoint damaged: it goes on from the one before."""
    record, _ = alone

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("steps") and done == 14:
            raise Stop

    with pytest.raises(Stop):
        pretrain(settings(), tmp_path, cache=cache, progress=stop)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    weights = tmp_path / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10] + b"0123456789")
    with pytest.warns(UserWarning, match="checkpoint-12 of .* damaged"):
        again = pretrain(settings(), tmp_path, cache=cache)
    assert losses(again) == losses(record)
    assert again["results"]["incomplete_checkpoints"] == 1


def test_gradient_accumulation_changes_nothing_but_rounding(alone, settings, cache, tmp_path):
    record = pretrain(settings(run={"micro_batch_rows": 1}), tmp_path, cache=cache)
    for name in ("train_loss", "validation_loss"):
        assert record["samples"][name] == pytest.approx(alone[0]["samples"][name], rel=1e-4)


def test_other_settings_do_not_go_on_with_a_run(alone, settings, cache):
    with pytest.raises(ValueError, match=r"other settings \(optim.learning_rate\)"):
        pretrain(settings(optim={"learning_rate": 1.0}), alone[1], cache=cache)


def test_the_second_writer_is_told_and_the_second_of_a_text_waits(settings, cache, tmp_path):
    """The folder's lock is held through the run, and a lock on tokenised text is waited for."""
    told = []

    def second(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith("steps") and done == 3:
            with pytest.raises(ValueError, match=r"another process is writing .*: wait until it has finished"):
                pretrain(settings(), tmp_path / "run", cache=cache)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(), tmp_path / "run", cache=cache, progress=second)
    assert os.listdir(tmp_path) == [], "a start without a checkpoint leaves nothing"

    data = settings().data
    folder = prepare(data, tmp_path / "cache")
    (folder / "manifest.json").unlink()
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    lock.acquire()
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(prepare, data, tmp_path / "cache", lambda what, *_: "waiting" in what and waiting.set())
        assert waiting.wait(30)
        lock.release()
        assert other.result(30) == folder
    assert os.listdir(tmp_path / "cache") == [folder.name]


def test_the_model_has_the_mode_of_new_files(alone):
    _, out = alone
    modes = {path.stat().st_mode & 0o777 for path in (out / "model").iterdir()}
    assert modes == {(out / "record.json").stat().st_mode & 0o777}


def test_a_diverged_run_stops_and_says_so(settings, cache, tmp_path, monkeypatch):
    original = MeaForCausalLM.forward

    def broken(self, *args, **kwargs):
        out: Any = original(self, *args, **kwargs)
        if self.training and (tmp_path / "checkpoint-8" / MARK).exists():
            out.loss = out.loss * torch.nan
        return out

    monkeypatch.setattr(MeaForCausalLM, "forward", broken)
    record = pretrain(settings(), tmp_path, cache=cache)
    assert record["results"]["diverged"]
    assert record["results"]["validation_loss"] is None
    assert len(record["samples"]["train_loss"]) == 9
    assert record["samples"]["train_loss"][-1] is None
    assert (tmp_path / "checkpoint-8" / MARK).exists()
    assert "at step 9" in (divergence_message(record) or "")


def test_a_full_disk_leaves_the_last_whole_checkpoint(settings, cache, tmp_path, monkeypatch):
    original = pretraining.PretrainTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step > 4:
            raise OSError(28, "No space left on device")
        original(self, folder)

    monkeypatch.setattr(pretraining.PretrainTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="checkpoint-4 is complete"):
        pretrain(settings(), tmp_path, cache=cache)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_writers_of_weights_and_tokenizers_have_errors_of_their_own_for_a_full_disk(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    for kind in (SafetensorError, Exception):
        with pytest.raises(OSError, match="no checkpoint was written yet"), disk_errors(tmp_path):
            raise kind("I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="other"), disk_errors(tmp_path):
        raise SafetensorError("other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"batch_tokens": 1 << 17, "tokens": 1 << 18}}, "less than one batch of 4096 rows"),
        ({"model": {"changes": {"num_hidden_layers": 10**9}}}, "GiB in each process, .* choose a smaller model"),
        ({"model": {"changes": {"hidden_size": 10**9}}}, "GiB in each process, .* choose a smaller model"),
        ({"optim": {"beta1": 1.0}}, "optim.beta1 must be less than 1"),
        ({"run": {"report_to": ["nobody"]}}, "nobody"),
        ({"run": {"shard": True}}, "several processes"),
        ({"model": {"variant": "transformer", "freeze_mixing": "random"}}, "do not suit 'gqa'"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(settings, cache, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(settings(**changes), tmp_path / "out", cache=cache)
    assert not (tmp_path / "out").exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_with_a_trap_is_refused_in_a_sentence(alone, settings, cache, tmp_path, name):
    shutil.copytree(alone[1], tmp_path / "out", ignore=shutil.ignore_patterns("model", "record.json", "checkpoint-20"))
    checkpoint = tmp_path / "out" / "checkpoint-16"
    torch.save(Trap(tmp_path / "sprung"), checkpoint / name)
    mark_complete(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-16 cannot be read \(.*Error\).* Remove it"):
        pretrain(settings(), tmp_path / "out", cache=cache)
    assert not (tmp_path / "sprung").exists()


def test_decay_is_for_matrices_alone(settings):
    model = build_model(settings(), 300, 0)
    groups = parameter_groups(model, 1.0, 0.1, 0.25)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert set(found) == {(1.0, 0.1), (1.0, 0.0), (0.25, 0.0)}
    assert all("_mixing" in name for name in found[0.25, 0.0])
    assert len(found[0.25, 0.0]) == 4
    assert all("norm" in name for name in found[1.0, 0.0])


@pytest.mark.parametrize(
    ("schedule", "end"), [("constant", 1.0), ("linear", 1 / 18), ("cosine", 0.1068), ("wsd", 0.325)]
)
def test_schedules(settings, cache, tmp_path, schedule, end):
    """The rate of the last step; 20 steps, 2 of warm-up, 4 of decay, to a tenth."""
    run = settings(optim={"schedule": schedule, "learning_rate": 1e-3}, run={"validations": 1, "checkpoints": 1})
    pretrain(run, tmp_path, cache=cache)
    state = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text(encoding="utf-8"))
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    start = 0.1 if schedule == "wsd" else 0.0
    assert rates[:2] == pytest.approx([start * 1e-3, (start + 1) / 2 * 1e-3])
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(end * 1e-3, rel=1e-3)


def test_frozen_mixing_stays_and_folding_keeps_the_function(settings, cache, tmp_path):
    frozen = settings(model={"freeze_mixing": "random"}, run={"validations": 1, "checkpoints": 1})
    pretrain(frozen, tmp_path / "frozen", cache=cache)
    torch.manual_seed(0)
    start = build_model(frozen, 300, 0).state_dict()
    end = MeaForCausalLM.from_pretrained(tmp_path / "frozen" / "model").state_dict()
    mixing = [name for name in end if "_mixing" in name]
    assert mixing
    assert all(torch.equal(start[name], end[name]) for name in mixing)

    folded = settings(run={"fold_at": 0.5, "validations": 1, "checkpoints": 1})
    record = pretrain(folded, tmp_path / "folded", cache=cache)
    end = MeaForCausalLM.from_pretrained(tmp_path / "folded" / "model").state_dict()
    assert all(torch.equal(end[name], torch.eye(4)) for name in mixing)
    assert record["samples"]["train_loss"][-1] < record["samples"]["train_loss"][0]


def test_tensorboard_gets_the_losses(settings, cache, tmp_path, monkeypatch):
    """The Trainer's reporter by its name; what it wrote is read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = settings(optim={"tokens": 4 * 128}, run={"report_to": ["tensorboard"], "validations": 1, "checkpoints": 1})
    record = pretrain(run, tmp_path / "run", cache=cache)
    (events,) = {path.parent for path in (tmp_path / "events").rglob("events.*")}
    found = EventAccumulator(str(events)).Reload()
    for tag, name in (("train/loss", "train_loss"), ("train/grad_norm", "grad_norm"), ("eval/loss", "validation_loss")):
        values = {event.step: event.value for event in found.Scalars(tag)}
        assert list(values.values()) == pytest.approx(record["samples"][name], rel=1e-3)  # of 4 digits


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_run_has_the_same_losses(settings, cache, tmp_path):
    """In fp32 another order of sums is all that compiling changes, over 4 steps."""
    short = {"optim": {"tokens": 4 * 128}, "run": {"validations": 1, "checkpoints": 1}}
    plain = pretrain(settings(**short), tmp_path / "plain", cache=cache)
    short["run"] |= {"compile": True}
    compiled = pretrain(settings(**short), tmp_path / "compiled", cache=cache)
    for name in ("train_loss", "validation_loss", "grad_norm"):
        assert compiled["samples"][name] == pytest.approx(plain["samples"][name], rel=1e-4)
    weights = MeaForCausalLM.from_pretrained(tmp_path / "compiled" / "model")  # names without the compiler's prefix
    assert weights.num_parameters() == plain["results"]["parameters"]
