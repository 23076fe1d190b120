"""The size of real caches against the product of their dimensions, and decoding that takes turns."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.testing._internal.two_tensor import TwoTensor

from mea.evaluate import speed
from mea.evaluate.speed import cache_size, decode_seconds, held_bytes, speed_ratio
from mea.models.quantized_cache import QuantisedCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_attention(tiny, dtype):
    size = cache_size(tiny().to(dtype), tokens=40)
    assert size.layer_bytes == (2 * 2 * 8 * 40 * dtype.itemsize,) * 2
    assert size.bytes_per_token == 2 * 2 * 2 * 8 * dtype.itemsize


def test_sliding_layers_hold_their_window_only(tiny):
    size = cache_size(tiny("Gemma3"), tokens=200)
    assert size.layer_bytes == (2 * 2 * 8 * 63 * 4, 2 * 2 * 8 * 200 * 4)


def test_decoding_takes_turns_and_continues_the_prompt(tiny):
    order, lengths = [], {"a": [], "b": []}
    models = {"a": tiny(), "b": tiny("Granite")}
    for name, model in models.items():

        def note(module, args, kwargs, name=name):
            order.append(name)
            lengths[name].append(int(kwargs["past_key_values"].get_seq_length()))

        model.register_forward_pre_hook(note, with_kwargs=True)
    seen = []
    samples = decode_seconds(models, 20, steps=4, warmup=2, progress=lambda *done: seen.append(done))
    assert order == ["a", "b"] * 6
    assert lengths == {"a": [20, 21, 22, 23, 24, 25], "b": [20, 21, 22, 23, 24, 25]}
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 4, "b": 4}
    assert all(second > 0 for seconds in samples.values() for second in seconds)
    assert seen[-1] == ("decoding in turns", 6, 6)


def test_speed_ratio_is_paired():
    middle, low, high = speed_ratio([1.0, 2.0, 30.0, 4.0, 5.0], [2.0, 4.0, 60.0, 8.0, 1.0])
    assert (middle, low, high) == (0.5, 0.5, 0.5)


def test_what_does_not_fit(tiny):
    with pytest.raises(ValueError, match="601 tokens do not fit the model's context of 600"):
        decode_seconds({"a": tiny()}, 590, steps=8, warmup=3)
    with pytest.raises(ValueError, match="must be positive"):
        decode_seconds({"a": tiny()}, 10, steps=0)
    with pytest.raises(ValueError, match="700 tokens do not fit"):
        cache_size(tiny(), 700)


def test_model_without_a_cache(tiny, monkeypatch):
    model = tiny()
    monkeypatch.setattr(model.base_model, "forward", lambda **_: object())
    with pytest.raises(ValueError, match="gives back no cache"):
        speed.cache_size(model, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_caches_with_their_scales(tiny, bits):
    """100 tokens: 4 as they are, one block of 64 in codes with two 16-bit numbers a group, 32 as they are."""
    size = cache_size(tiny(), 100, lambda config: QuantisedCache(config, bits))
    keys = 64 * 16 * bits // 8 + 2 * 2 * 16
    values = 64 * 16 * bits // 8 + 2 * 2 * 64 * 2
    assert size.layer_bytes == (keys + values + 36 * 2 * 16 * 4,) * 2


def test_quantised_caches_of_transformers(tiny):
    """One scale for all, in the eight bits of a number each: what it keeps beside them is of no size."""
    size = cache_size(tiny(), 100, lambda config: transformers.QuantizedCache("fp8", config))
    assert size.layer_bytes == (100 * 2 * 16,) * 2


def test_decoding_over_another_cache(tiny):
    caches = {"b": lambda config: QuantisedCache(config, 8)}
    samples = decode_seconds({"a": tiny(), "b": tiny()}, 70, steps=3, warmup=1, caches=caches)
    assert [len(x) for x in samples.values()] == [3, 3]


def test_a_tensor_made_of_others_counts_as_those():
    layer = SimpleNamespace(keys=TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3)), values=[torch.zeros(4, 5)])
    assert held_bytes(SimpleNamespace(layers=[layer])) == (2 * 24 + 80,)
