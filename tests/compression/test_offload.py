"""A model larger than memory: weights stay on disk, are read layer by layer, and the result is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mea
from compression.small import SIZES, tiny
from mea.compression import Calibration
from mea.compression.save import compress_to_folder
from mea.models import loading

TOKENS = (torch.arange(40) * 31 % SIZES["vocab_size"])[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def on_disk(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("method", ["post_rope:uniform", "svd"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")  # that is the point
def test_an_offloaded_model_gives_what_one_in_memory_gives(
    model_type: str, method: str, tokenizer: Any, calibration: Calibration, tmp_path: Path
) -> None:
    original = tiny(model_type)
    original.save_pretrained(tmp_path / "original")
    size = sum(parameter.nbytes for parameter in original.parameters())
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    assert on_disk(offloaded), "nothing was offloaded: the test tests nothing"
    before = on_disk(offloaded)

    options = {"method": method, "calibration": calibration}
    expected = mea.compress(original, tokenizer, **options)
    compressed = mea.compress(offloaded, tokenizer, **options)

    assert on_disk(offloaded) == before
    assert torch.equal(logits(offloaded), logits(original))
    assert on_disk(compressed), "weights that did not change need not be in memory"
    assert torch.equal(logits(compressed), logits(expected))
    compressed.save_pretrained(tmp_path / "compressed", max_shard_size="20kB")
    assert len(list((tmp_path / "compressed").glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert not on_disk(reloaded)
    assert torch.equal(logits(reloaded), logits(expected))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_folder_that_does_not_fit_into_memory_is_compressed_from_disk(
    saved: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "post_rope", "calibration": calibration, "measure_tokens": 0}
    compress_to_folder(str(saved), tmp_path / "expected", **options)
    # As much memory as half of the weights: transformers then leaves the rest on disk.
    free = (saved / "model.safetensors").stat().st_size / 2 / loading.MEMORY_SHARE
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    seen = []
    original = loading.AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        seen.extend(on_disk(loaded[0]))
        return loaded

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", watched)
    compress_to_folder(str(saved), tmp_path / "out", **options)
    monkeypatch.undo()
    assert seen, "nothing was offloaded: the test tests nothing"
    assert not (tmp_path / "out.partial").exists()
    results = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("expected", "out")]
    assert torch.equal(logits(results[0]), logits(results[1]))
