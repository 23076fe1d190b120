"""Packed caches from options to folder: the plan, its words, refinement, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from compression.small import packed, planned, tiny
from mea.compression import Calibration, preview
from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.options import Refinement
from mea.compression.save import compress_to_folder
from mea.evaluate.speed import cache_size
from mea.models.card import origin
from mea.models.loading import load
from mea.records import read_record
from mea.report.sections.compression import compression_table, plan_table
from tiny_models import stock

METHODS = ("predictive", "joint")


@pytest.fixture
def long_model(saved: Path) -> Path:
    """The saved model with a context in which exact tokens are few."""
    tiny(max_position_embeddings=8192).save_pretrained(saved)
    return saved


def text_of(table: Any) -> str:
    return " ".join(str(cell) for line in table.part.table.lines for cell in line) + " " + table.part.table.note


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_says_what_will_be_kept(method: str, long_model: Path) -> None:
    plan = preview(str(long_model), method=method, calibration=Calibration(tokens=1024, window=128))
    assert plan["context"] == 8192
    assert plan["bytes_at_context"] == int(0.2 * 8192 * 2 * 3 * 64)
    assert plan["seconds"] > 0
    words = text_of(plan_table(plan))
    assert {"predictive": "without rebuilding keys", "joint": "keys rebuilt at every reading"}[method] in words
    assert "8, 4, 2 or 0 for each of 64 components a layer" in words
    assert "the first 4 and the newest 64" in words
    assert "in float32; --dtype bfloat16 halves it" in words
    refined = preview(str(long_model), method=method, refine=2, calibration=Calibration(tokens=1024, window=128))
    assert refined["seconds"] > plan["seconds"]


def test_a_budget_in_bytes_is_kept_at_its_own_length(long_model: Path) -> None:
    options = {"budget": "4k tokens in 400 kB", "calibration": Calibration(tokens=1024, window=128)}
    plan = preview(str(long_model), **options)
    assert (plan["context"], plan["bytes_at_context"]) == (4096, 400_000)


def test_a_folder_holds_its_bits_and_keeps_its_budget(long_model: Path, calibration: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = preview(str(long_model), calibration=calibration)["result_bytes"]
    record = compress_to_folder(str(long_model), out, calibration=calibration, measure_tokens=256)
    assert read_record(out / "compression.json")["config"]["tiers"] == record["config"]["tiers"]
    model, _ = load(str(out), "auto")
    # The plan counts encoders and decoders of all components; those of 0 bits are not saved.
    saved = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert sum(parameter.numel() * 4 for parameter in load(str(long_model))[0].parameters()) < saved <= planned
    dropped = 4 * 64 * 3 * sum(64 - sum(map(sum, tiers)) for tiers in record["config"]["tiers"])
    assert planned - saved <= dropped  # each has at most three columns or rows of 64 numbers
    results = record["results"]
    assert results["cache_bytes_per_token"] == cache_size(model, 8192).bytes_per_token
    assert results["cache_bytes_per_token"] <= 0.2 * 2 * 3 * 64
    assert len(results["layer_expected_loss"]) == 3
    assert json.loads((out / "config.json").read_text())["cache_code"]["tiers"] == record["config"]["tiers"]
    words, card = text_of(compression_table(record, "out")), (out / "README.md").read_text()
    assert "Components of a layer with 8, 4, 2 and 0 bits" in words
    assert "components of a layer with 8, 4, 2 and 0 bits" in card
    assert "the first 4 and the newest 64" in card
    fields = ModelCard(card).data
    assert (fields.pipeline_tag, fields.library_name) == ("text-generation", "transformers")
    assert fields.eval_results[0].metric_value == pytest.approx(results["perplexity"])
    assert "base_model" not in fields.to_dict()  # a local folder of stock weights has no name on a hub


def test_a_card_passes_on_what_the_original_s_says(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    stock("llama").save_pretrained(folder)
    assert origin(str(folder)) == {}
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: some/ancestor\n---\ntext")
    assert origin(str(folder)) == {"license": "mit"}
    (folder / "compression.json").write_text("{}")
    assert origin(str(folder)) == {"license": "mit", "base_model": "some/ancestor"}
    for damaged in ("---\nlicense: [\n---\n", "---\nlicense: 7\n---\n", "no fields"):
        (folder / "README.md").write_text(damaged)
        assert origin(str(folder)) == {}


def test_layers_that_pack_come_nearer_to_the_originals() -> None:
    """With the rounding in the loop; means stay, and what is not trained is shared with the original."""
    _, original = packed(keep=0.06)
    tokens = torch.randint(0, 256, (16, 128))
    how = Refinement(passes=4, window=128, batch=2, held_out=4, lr=1e-3, base_lr=3e-4)
    calibration = Calibration(tokens=2048, window=128)
    plans = [
        planned(original.config, method="predictive", keep=0.06, refine=refine, calibration=calibration)
        for refine in (how, 0)
    ]
    refined, plain = run_plans(LayerWalk(original), tokens, plans)
    assert refined.refined
    losses = [pair for pair in refined.refined.layers if pair]
    assert len(losses) == 3
    assert all(pair.after <= pair.before for pair in losses)
    assert any(pair.after < pair.before for pair in losses)
    changed = set()
    for own, other in zip(refined.model.model.layers, plain.model.model.layers, strict=True):
        for name, parameter in own.self_attn.named_parameters():
            if not torch.equal(parameter, other.self_attn.get_parameter(name)):
                changed.add(name)
        assert torch.equal(own.self_attn.code.key_mean, other.self_attn.code.key_mean)
        assert own.mlp.up_proj.weight is other.mlp.up_proj.weight
    assert any(name.startswith("code.") for name in changed)
    assert refined.model.config.compression["refinement"]["passes"] == 4


def test_a_refined_folder_goes_on_and_loads(long_model: Path, calibration: Any, tmp_path: Path) -> None:
    options = {
        "calibration": calibration, "measure_tokens": 0, "keep": 0.06,
        "refine": Refinement(passes=2, window=64, batch=1, held_out=2),
    }  # fmt: skip

    def stop(what: str, done: int, _: int) -> None:
        if (what, done) == ("refining", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_to_folder(str(long_model), tmp_path / "stopped", progress=stop, **options)
    for name in ("stopped", "whole"):
        compress_to_folder(str(long_model), tmp_path / name, **options)
    ids = torch.arange(200)[None] * 31 % 256
    with torch.no_grad():
        both = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("stopped", "whole")]
    assert torch.equal(*both)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups is an option of methods that lower ranks, such as svd"),
        ({"layout": "ranks.json"}, "has bits, not ranks: give keep, budget or a layout of full, half, deep"),
        ({"keep": 0.001}, "at 8,192 tokens, and the smallest packed cache takes"),
        ({"keep": 20.0}, "at most 1, not 20"),
        ({"keep": 0.5, "budget": "1k tokens in 1 MB"}, "give one budget"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(method: str, options: dict[str, Any], message: str) -> None:
    config = tiny(max_position_embeddings=8192).config
    with pytest.raises(ValueError, match=message):
        planned(config, method=method, **options)


def test_the_planned_size_of_lower_ranks_is_exact(long_model: Path, calibration: Any, tmp_path: Path) -> None:
    options = {"method": "svd", "keep": 0.5, "calibration": calibration}
    compress_to_folder(str(long_model), tmp_path / "out", measure_tokens=0, **options)
    saved = sum(parameter.numel() * 4 for parameter in load(str(tmp_path / "out"))[0].parameters())
    assert preview(str(long_model), **options)["result_bytes"] == saved


def test_a_budget_above_8_bits_is_planned_as_what_it_gives(long_model: Path, calibration: Any, tmp_path: Path) -> None:
    plan = preview(str(long_model), keep=0.9, calibration=calibration)
    record = compress_to_folder(str(long_model), tmp_path / "out", keep=0.9, calibration=calibration, measure_tokens=0)
    assert record["config"]["tiers"] == [[[32, 0, 0], [32, 0, 0]]] * 3
    assert record["results"]["cache_bytes_per_token"] == pytest.approx(plan["bytes_per_token"], abs=1)
