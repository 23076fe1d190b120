"""Models that pack their caches are saved and loaded without a change, with this package or without it."""

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM

from coded_models import coded
from mea.models.latent_attention import COMPRESSED_MODELS, MODELLING_FILE, SUPPORTED, modelling_source
from models.test_latent_attention_saving import WITHOUT_THIS_PACKAGE
from tiny_models import generate, tokens

READINGS = ("predictive", "joint")


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def made(kind, reading):
    return coded(kind, reading).float()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_saving_and_loading_changes_nothing(kind, reading, tmp_path):
    model, ids = made(kind, reading), tokens(length=30)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again.config._experts_implementation = "eager"
    assert type(again) is COMPRESSED_MODELS[kind]
    assert again.config.cache_code == model.config.cache_code
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(generate(again, ids), generate(model, ids))


@pytest.mark.parametrize("reading", READINGS)
def test_loading_in_bf16_and_saving_again(reading, tmp_path):
    made("llama", reading).save_pretrained(tmp_path / "fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "bf16")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").eval(), tokens(length=30)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, ids), logits(model, ids))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_saved_code_computes_the_same(tmp_path):
    """In a process that cannot import this package; what it saves is complete.

    Another process lays its memory out differently and may sum in another order: a code can flip, but the median is
    off by rounding only, once for every number of the hidden state in every layer.
    """
    kinds = [("llama", "predictive"), ("llama", "joint"), ("gemma3_text", "predictive"), ("mistral", "joint")]
    models, ids = {"-".join(pair): made(*pair) for pair in kinds}, tokens(length=30)
    for name, model in models.items():
        model.save_pretrained(tmp_path / "models" / name)
    torch.save(ids, tmp_path / "ids.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    files = [tmp_path / "models", tmp_path / "ids.pt", tmp_path / "results.pt"]
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    for name, model in models.items():
        kind, found, generated = results[name]
        assert kind == type(model).__name__
        expected = logits(model, ids)
        allowed = model.config.num_hidden_layers * model.config.hidden_size * 2**-23 * expected.abs().max()
        assert (found - expected).abs().median() <= allowed
        assert (generated == generate(model, ids, max_new_tokens=8)).float().mean() > 0.9
        folder = tmp_path / "models" / name
        assert (folder / "again" / MODELLING_FILE).read_text(encoding="utf-8") == modelling_source()
        again = AutoModelForCausalLM.from_pretrained(folder / "again").eval()
        assert torch.equal(logits(again, ids), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiers": []}, "must give tiers or null for each of the 3 layers"),
        ({"reading": "guessing"}, "readings of a packed cache are predictive, joint, not 'guessing'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message, tmp_path):
    config = made("llama", "joint").config
    config.cache_code = config.cache_code | change
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


def test_pushed_to_a_hub_are_the_files_of_a_saved_folder(tmp_path, monkeypatch):
    """What reaches the hub's client, which is replaced here, is what `save_pretrained` writes, and a card."""
    pushed = []

    class Hub:
        """The calls of the hub's client that transformers makes."""

        def create_repo(self, name, **options):
            return type("Repository", (), {"repo_id": name})

        def create_commit(self, *, operations, **options):
            pushed.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("# A card"))
    model = made("llama", "predictive")
    model.push_to_hub("someone/small")
    model.save_pretrained(tmp_path)
    assert {*pushed} - {"README.md"} == {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert {"README.md", MODELLING_FILE, "config.json", "model.safetensors"} <= {*pushed}
