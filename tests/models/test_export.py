"""Compressed models with whole heads as stock checkpoints: the same logits, without this package."""

import subprocess
import sys

import pytest
import torch

from compression.small import tiny
from mea.compression import compress
from mea.compression.save import compress_to_folder
from mea.models.export import export, stock_heads


@pytest.mark.parametrize(("kind", "method", "heads"), [
    ("llama", "gqa-mean", 2), ("qwen2", "gqa-mean", 2), ("granite", "gqa-mean", 1), ("llama", "gqa-procrustes", 1),
    ("mistral", "gauge", 1), ("llama", "svd", 1),
])  # fmt: skip
def test_the_stock_model_computes_the_same(kind, method, heads, tokenizer, calibration):
    model = compress(tiny(kind, torch.float64), tokenizer, method=method, keep=heads / 4, calibration=calibration)
    made = stock_heads(model)
    assert (made.config.num_key_value_heads, made.config.model_type) == (heads, kind)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(tokens).logits, made(tokens).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()  # rotations and softmax are fp32


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("llama", {"method": "gauge", "keep": 0.5}, "layer 0: heads read several components"),
    ("qwen3", {"method": "gqa-mean", "keep": 0.5}, "norms of heads"),
    ("llama", {"method": "predictive", "keep": 0.9}, "the cache is packed"),
    ("llama", {"method": "gqa-mean", "layout": "deep"}, "equally many whole kv heads"),
    ("llama", None, "is not compressed"),
])  # fmt: skip
def test_what_no_stock_architecture_has_is_refused(kind, options, message, tokenizer, calibration):
    model = tiny(kind) if options is None else compress(tiny(kind), tokenizer, calibration=calibration, **options)
    with pytest.raises(ValueError, match=message):
        stock_heads(model)


def test_a_folder_loads_with_transformers_alone(saved, tokenizer, calibration, tmp_path):
    options = {"method": "gqa-mean", "keep": 0.5, "calibration": calibration, "measure_tokens": 0}
    compress_to_folder(str(saved), tmp_path / "small", **options)
    export(str(tmp_path / "small"), tmp_path / "stock")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained(sys.argv[1]);"
        "assert 'mea' not in sys.modules; print(type(m).__name__, m.config.num_key_value_heads)"
    )
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "stock"], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["LlamaForCausalLM", "2"]
    assert not (tmp_path / "stock.partial").exists()
    card = (tmp_path / "stock" / "README.md").read_text(encoding="utf-8")
    assert "| key/value heads | 4 | 2 |" in card
    assert "import mea" not in card
    assert (tmp_path / "stock" / "compression.json").is_file()
    with pytest.raises(ValueError, match="not an empty folder"):
        export(str(tmp_path / "small"), tmp_path / "stock")


def test_what_cannot_be_exported_is_refused_before_the_model_loads(
    saved, tokenizer, calibration, tmp_path, monkeypatch
):
    options = {"method": "predictive", "keep": 0.9, "calibration": calibration, "measure_tokens": 0}
    compress_to_folder(str(saved), tmp_path / "packed", **options)
    monkeypatch.setattr("mea.models.export.load", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="the cache is packed"):
        export(str(tmp_path / "packed"), tmp_path / "stock")
