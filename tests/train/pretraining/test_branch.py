"""A run with decay that goes on from a run at a constant rate is the run that decays, trained from the beginning."""

import shutil
from pathlib import Path

import pytest

from mea.records import read_record
from mea.train.pretraining.dataset import TokenStream
from mea.train.pretraining.run import pretrain
from mea.train.pretraining.sweep import STEPS, sweep, work
from mea.train.pretraining.sweep_file import SweepRun
from tiny_corpus import merged

DECAY = {"optim": {"schedule": "wsd", "final_fraction": 0.0, "decay_fraction": 0.2}}
BEFORE = "checkpoint-16"  # of 20 steps


@pytest.fixture(scope="module")
def constant(settings, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("constant")
    return pretrain(settings(), out, cache=cache), out


def test_a_branch_is_the_whole_run(constant, settings, cache, tmp_path):
    """Bit by bit, and again when it is killed and goes on from its own checkpoint."""
    whole = pretrain(settings(**DECAY), tmp_path / "whole", cache=cache)
    branch = pretrain(settings(**DECAY), tmp_path / "branch", cache=cache, start_from=constant[1] / BEFORE)
    assert branch["samples"] == whole["samples"]
    assert branch["samples"]["train_loss"][:17] == constant[0]["samples"]["train_loss"][:17]
    assert branch["samples"]["validation_loss"][-1] != constant[0]["samples"]["validation_loss"][-1]
    assert (whole["results"]["branched_at_step"], branch["results"]["branched_at_step"]) == (None, 16)
    again = pretrain(settings(**DECAY), tmp_path / "branch", cache=cache, start_from=constant[1] / BEFORE)
    assert (again["samples"], again["results"]["branched_at_step"]) == (whole["samples"], 16)


@pytest.mark.parametrize(
    ("checkpoint", "changes", "message"),
    [
        ("checkpoint-8", {}, "no complete checkpoint"),
        (BEFORE, {"optim": {"learning_rate": 1.0}}, r"these differ: optim\.learning_rate"),
        (BEFORE, {"model": {"variant": "groupnorm"}, "run": {"seed": 1}}, r"model\.variant, run\.seed"),
        (BEFORE, {"optim": {"decay_fraction": 0.4}}, "decay from 12"),
        (BEFORE, {"optim": {"final_fraction": 0.1}}, "final_fraction = 0"),
        (BEFORE, {"optim": {"schedule": "cosine"}}, "'cosine'"),
    ],
)
def test_what_is_no_branch_of_a_run_is_refused(constant, settings, cache, tmp_path, checkpoint, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(settings(**merged(DECAY, changes)), tmp_path, cache=cache, start_from=constant[1] / checkpoint)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("content", ["", "[]", '{"optim": 7}', '{"optim": {"learning_rate": []}}', "[" * 2000])
def test_damaged_settings_are_named(settings, cache, tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"settings\.json is (not JSON|damaged)|other settings \(.*optim.learning_rate"
    ):
        pretrain(settings(), tmp_path, cache=cache)


@pytest.mark.parametrize("content", ["{", "7", "{}", '{"shards": {"training": [{"tokens": 1}]}}'])
def test_a_damaged_manifest_is_named(constant, cache, tmp_path, content):
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    manifest = next(copied.glob("*/manifest.json"))
    manifest.write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is (not JSON|damaged)"):
        TokenStream(manifest.parent, "training")


def test_a_sweep_keeps_checkpoints_and_branches_from_them(tables, tmp_path):
    """The second run goes on from what the first kept; the third finds nothing kept and is trained whole."""
    base = merged(tables, {"optim": {"learning_rate": 1e-3}})
    runs = [
        SweepRun("mea-0.001-0", base, "mea-0.001-0", keep=0.8),
        SweepRun("mea-0.001-0-wsd", merged(base, DECAY), "mea-0.001-0", branch=0.8),
        SweepRun("mea-0.001-1-wsd", merged(base, merged(DECAY, {"run": {"seed": 1}})), "mea-0.001-1", branch=0.8),
    ]
    notes: list[str] = []

    def here(command: list[str], log: str) -> int:
        """In this process, which has everything imported."""
        assert command[7] == "cpu"
        work(*command[3:])
        assert (Path(log).parent / STEPS).read_text() == "20"  # which the sweep tells of while a run goes on
        return 0

    counts = sweep(runs, tmp_path / "records", tmp_path / "work", launch=here, device="cpu", note=notes.append)
    assert counts["finished"] == 3, notes
    assert (tmp_path / "work" / "kept" / "mea-0.001-0" / BEFORE).is_dir()
    steps = [read_record(tmp_path / "records" / f"{run.name}.json")["results"]["branched_at_step"] for run in runs]
    assert steps == [None, 16, None]
