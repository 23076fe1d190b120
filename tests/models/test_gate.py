"""Model folders that are damaged, absurd or hostile are refused in one sentence, before weights are read."""

import ast
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mea
from mea.models.loading import load, load_config, load_tokenizer, load_tokenizer_alone

DEEP = "[" * 100_000


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    """The model in several files, with an index."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(folder, max_shard_size="50kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [DEEP, '{"a": ' + DEEP, "", "\xff", "7", '{"weight_map": 3, "model_type": "llama'])
def test_json_that_is_no_object(name: str, content: str, sharded: Path) -> None:
    (sharded / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged .*; copy or download it again"):
        load_config(str(sharded))


def test_nested_headers_and_tokenizers(saved: Path) -> None:
    (saved / "tokenizer.json").write_text('{"a": ' + DEEP)
    with pytest.raises(ValueError, match="cannot read the tokenizer of"):
        load_tokenizer(str(saved))
    header = ('{"a": ' + DEEP).encode()
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete \(it is nested too deep\)"):
        load_config(str(saved))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_hidden_layers", value) for value in (-1, 0, 10**9, 2.5, "3", True, None, [3])],
        *[("hidden_size", 0), ("vocab_size", 10**12), ("num_attention_heads", -8), ("head_dim", 0)],
        *[("max_position_embeddings", 2**40), ("num_key_value_heads", 3), ("intermediate_size", "big")],
        *[("dtype", 7), ("dtype", "int8"), ("torch_dtype", "float8_e4m3fn"), ("rms_norm_eps", -1.0)],
        *[("rms_norm_eps", float("nan")), ("rope_theta", 0), ("transformers_weights", "../x.safetensors")],
        *[("rope_parameters", 7), ("rope_parameters", {"rope_type": "other", "rope_theta": 1e4})],
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "two"}),
        ("rope_scaling", {"type": "linear", "factor": float("inf")}),
        *[("output_hidden_states", ["a"]), ("return_dict", 3), ("eos_token_id", "end")],
    ],
)
def test_absurd_configurations(name: str, value: Any, saved: Path) -> None:
    change(saved / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json: .*{name}"):
        load_config(str(saved))


@pytest.mark.parametrize("value", ["long", True, [1]])
def test_a_tokenizer_whose_length_is_no_number(value: Any, saved: Path) -> None:
    change(saved / "tokenizer_config.json", model_max_length=value)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: model_max_length is a number of tokens"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize("value", [7, {"a": 1}, ["x"]])
def test_a_tokenizer_with_a_token_of_the_wrong_type(value: Any, saved: Path) -> None:
    change(saved / "tokenizer_config.json", eos_token=value)
    with pytest.raises(ValueError, match="cannot read the tokenizer of"):
        load_tokenizer(str(saved))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "..\\secret.safetensors", "a/../../secret.safetensors"]
)
def test_an_index_that_names_files_elsewhere(name: str, sharded: Path) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    index = sharded / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=names | {"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"the weights in model\.norm\.weight are in .*, outside of the folder"):
        load_config(str(sharded))
    change(index, weight_map=names | {"model.norm.weight": "weights.bin"})
    with pytest.raises(ValueError, match=r"in 'weights\.bin'; only \.safetensors files are read"):
        load_config(str(sharded))


@pytest.mark.parametrize("answer", ["y\n", ""])
@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_code_is_never_run_and_never_asked_for(
    answer: str, model_type: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = saved / "ran"
    (saved / "trap.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    (saved / "custom_generate").mkdir()
    shutil.copy(saved / "trap.py", saved / "custom_generate" / "generate.py")
    classes = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap", "AutoTokenizer": ["trap.Trap", None]}
    change(saved / "config.json", auto_map=classes, model_type=model_type)
    change(saved / "tokenizer_config.json", auto_map=classes, tokenizer_class="Trap")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for read in (load_config, load_tokenizer, load_tokenizer_alone, load):
        if read is load_config and model_type == "llama":
            assert read(str(saved)).model_type == "llama"
            continue
        with pytest.raises(ValueError, match=r"code that comes with it.* never run"):
            read(str(saved))
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"code that comes with it.* never run"):
        load_tokenizer_alone(str(saved))
    assert not ran.exists()


def test_no_file_of_the_package_lets_transformers_ask() -> None:
    """Every ``Auto….from_pretrained`` says ``trust_remote_code=False``, itself or by options that begin with it."""
    for path in Path(mea.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in (
                "AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "kind.from_pretrained",
                "AutoModelForCausalLM.from_pretrained",
            ):  # fmt: skip
                text = ast.unparse(call)
                assert "trust_remote_code=False" in text or text.endswith("(folder, **options)"), f"{path}: {text}"


def test_adapters_are_not_followed_to_their_model(saved: Path) -> None:
    (saved / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config\.json\): merge it"):
        load_config(str(saved))


@pytest.mark.parametrize("kind", ["I32", "U32"])
def test_weights_that_are_stored_as_integers(kind: str, saved: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_header(saved / "model.safetensors", lambda header: header[name].update(dtype=kind))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is stored as {kind}, and weights are F64, F32"):
        load_config(str(saved))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(value: float, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights in model\.layers\.1\.mlp\.up_proj\.weight are not all finite"):
        load(str(saved))


def test_weights_that_a_narrower_dtype_cannot_hold(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][0] = 1e30
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    load(str(saved), "bfloat16")
    with pytest.raises(ValueError, match=r"model\.norm\.weight are not all finite in float16; .*a wider dtype"):
        load(str(saved), "float16")


def test_weights_that_the_configuration_leaves_out_or_shapes_otherwise(saved: Path) -> None:
    config = (saved / "config.json").read_text()
    change(saved / "config.json", num_hidden_layers=2)
    with pytest.raises(
        ValueError, match=r"has 9 weights that a llama of its configuration has not, such as model\.lay"
    ):
        load(str(saved))
    (saved / "config.json").write_text(config)
    change(saved / "config.json", intermediate_size=40)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight is \[32, 48\], and by the .* \[32, 40\]"):
        load(str(saved))
    (saved / "config.json").write_text(config)
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 weights .* such as model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(str(saved))


def test_a_mistyped_folder_is_not_blamed_on_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent.parent)
    with pytest.raises(ValueError, match=r"/orignal does not exist: there is no such folder or file"):
        load_config(f"{saved.parent.name}/orignal")
    with pytest.raises(ValueError, match="orignal: there is no such folder or file, and the hub did not give it"):
        load_config("orignal")
