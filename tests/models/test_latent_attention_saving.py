"""A compressed model is saved, moved and loaded again without a change, with this package or without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mea.models.latent_attention import COMPRESSED_MODELS, MODELLING_FILE, SUPPORTED, modelling_source
from mea.ops.cache_forms import FORMS
from tiny_models import EVEN, REDUCED, compress, generate, stock, tokens

# Loads every model of a folder with the code that was saved beside it, and saves its logits; `mea` cannot be imported.
WITHOUT_THIS_PACKAGE = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mea":
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM

ids, results = torch.load(sys.argv[2]), {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert "mea" not in sys.modules
    with torch.no_grad():
        logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.save_pretrained(folder / "again")
    results[folder.name] = (type(model).__name__, logits, generated)
torch.save(results, sys.argv[3])
"""


@pytest.fixture(params=SUPPORTED)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind):
    return compress(stock(kind))


def made(kind, form):
    return compress(stock(kind), EVEN if form == "joint" else REDUCED, form)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def check_saved(model, kind, folder, dtype):
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is COMPRESSED_MODELS[kind]
    assert again.dtype == dtype
    ids = tokens()
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(generate(again, ids), generate(model, ids))


def test_saving_and_loading_changes_nothing(model, kind, tmp_path):
    check_saved(model, kind, tmp_path / "fp32", torch.float32)
    assert AutoConfig.from_pretrained(tmp_path / "fp32").latent_ranks == [[16, 16], None, [12, 20]]
    # Not model.bfloat16(): that rounds the rotary frequencies, which loading never does.
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).eval()
    check_saved(rounded, kind, tmp_path / "bf16", torch.bfloat16)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "post_rope"])
def test_the_form_of_the_latents_is_saved(kind, form, tmp_path):
    model = made(kind, form)
    assert not any("rotary" in name for name in model.state_dict())
    check_saved(model, kind, tmp_path, torch.float32)
    assert AutoConfig.from_pretrained(tmp_path).latent_form == form
    check_saved(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(),
        kind,
        tmp_path / "bf16",
        torch.bfloat16,
    )


def test_a_model_saved_before_there_were_forms_has_rotated_keys(tmp_path):
    model = compress(stock("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["latent_form"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(model, ids))


def test_the_modelling_file_is_the_one_that_is_generated(tmp_path):
    model = compress(stock("llama"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / MODELLING_FILE).read_text(encoding="utf-8")
    assert text == modelling_source()
    assert "import mea" not in text
    assert "from mea" not in text


@pytest.fixture(scope="module")
def without_this_package(tmp_path_factory):
    """Every architecture: ids, the models here, and what another process made of the saved ones."""
    torch.manual_seed(0)
    folder, files = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("files")
    models = {f"{kind}-{form}": made(kind, form) for kind in SUPPORTED for form in FORMS}
    ids = tokens()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    torch.save(ids, files / "ids.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(files / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, folder, files / "ids.pt", files / "results.pt"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ids, models, torch.load(files / "results.pt"), folder


@pytest.mark.parametrize("form", FORMS)
def test_the_saved_code_computes_the_same(without_this_package, kind, form):
    ids, models, results, _ = without_this_package
    model = models[f"{kind}-{form}"]
    name, logits_there, generated_there = results[f"{kind}-{form}"]
    assert name == COMPRESSED_MODELS[kind].__name__
    # Not equal to the bit: another process lays its memory out differently, and some products (those of experts, on
    # some processors) sum in an order that depends on it. Every layer may round as often as its hidden state is wide.
    expected, config = logits(model, ids), model.config
    roundings = config.num_hidden_layers * config.hidden_size
    allowed = roundings * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (logits_there - expected).abs().max() <= allowed
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated_there, expected)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_saved_code_saves_is_complete(without_this_package, kind, form):
    """Saved from there, the model has its modelling file, and this package loads it."""
    ids, models, _, folder = without_this_package
    kind = f"{kind}-{form}"
    assert (folder / kind / "again" / MODELLING_FILE).read_text(encoding="utf-8") == modelling_source()
    again = AutoModelForCausalLM.from_pretrained(folder / kind / "again").eval()
    assert torch.equal(logits(again, ids), logits(models[kind], ids))


def damaged(folder: Path, lost: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("lost", ["layers.0.self_attn.head_mixing.key_decoder", "layers.2.self_attn.q_proj.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(model, tmp_path, lost):
    model.save_pretrained(tmp_path)
    damaged(tmp_path, lost)
    with pytest.raises(ValueError, match=rf"lacks 1 weights, such as model\.{lost}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("form", "ranks", "message"),
    [
        ("mixed", [[16, 16]] * 3, "the cache forms are post_rope, pre_rope, joint, not 'mixed'"),
        ("joint", [[12, 20]] * 3, r"cached in two equal halves: .* not \[12, 20\]"),
    ],
)
def test_a_configuration_with_a_form_that_cannot_be_is_refused(form, ranks, message):
    config = compress(stock("llama")).config
    config.latent_form, config.latent_ranks = form, ranks
    with pytest.raises(ValueError, match=message):
        COMPRESSED_MODELS["llama"](config)


def test_a_model_of_an_older_version_is_refused_with_what_to_do():
    """Its configuration names ranks otherwise: without a word every layer would be uncompressed, or fail to load."""
    config = compress(stock("llama")).config
    config.latent_widths, config.latent_ranks = config.latent_ranks, None
    with pytest.raises(ValueError, match=r"older version of mea .* mea compress MODEL OUT"):
        COMPRESSED_MODELS["llama"](config)


@pytest.mark.parametrize("form", ["rotated", "unrotated"])
def test_a_model_with_an_older_name_of_its_form_is_refused_with_what_to_do(tmp_path, form):
    """Through the Auto classes too."""
    config = compress(stock("llama")).config
    config.latent_form = form
    with pytest.raises(ValueError, match=r"older version of mea .* mea compress MODEL OUT"):
        AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"older version of mea .* mea compress MODEL OUT"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("ranks", [None, [], [[16, 16]], [[16, 16]] * 4])
def test_a_configuration_with_widths_for_other_layers_is_refused(model, kind, ranks):
    config = model.config
    config.latent_ranks = ranks
    with pytest.raises(ValueError, match=r"for each of the 3 layers"):
        COMPRESSED_MODELS[kind](config)
