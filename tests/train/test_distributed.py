"""Two processes, by gloo, do what one does: the batch shared out (DDP), or the model as well (FSDP2)."""

import json
import shutil

import pytest

from mea.models.decoder import MeaForCausalLM
from mea.records import read_record
from mea.train.fsdp import shard
from mea.train.pretraining.run import build_model, pretrain
from mea.train.pretraining.settings import settings_from
from mea.train.pretraining.sweep import WORKER
from tiny_corpus import merged
from two_processes import run_on_two


def test_one_process_has_nothing_to_share_with(settings):
    model = build_model(settings(), 300, 0)
    with pytest.raises(ValueError, match="several processes"):
        shard(model, model.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_do_what_one_does_and_go_on_from_a_checkpoint(tables, cache, tmp_path, sharded):
    alone = pretrain(settings_from(tables), tmp_path / "alone", cache=cache)
    out, target, script = tmp_path / "run", tmp_path / "record.json", tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    arguments = [json.dumps(merged(tables, {"run": {"shard": sharded}})), str(out), str(cache), str(target)]
    run_on_two(script, *arguments)
    together = read_record(target)
    assert together["results"]["processes"] == 2
    # The same batches; only the order in which fp32 gradients are summed differs, over 20 steps.
    for name in ("train_loss", "validation_loss"):
        assert together["samples"][name] == pytest.approx(alone["samples"][name], rel=1e-4)
    parts = out / "checkpoint-20" / "optimizer"
    assert sorted(p.name for p in parts.glob("*.distcp")) == (["__0_0.distcp", "__1_0.distcp"] if sharded else [])
    assert MeaForCausalLM.from_pretrained(out / "model").num_parameters() == alone["results"]["parameters"]

    for folder in ("checkpoint-20", "model"):
        shutil.rmtree(out / folder)
    target.unlink()
    run_on_two(script, *arguments)
    assert read_record(target)["samples"] == together["samples"]
