"""One layer of a packed cache by itself: what is exact, what is coded, and the bytes of its tensors."""

import copy

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from mea.models.packed_cache import CHUNK, PackedLayer, all_dynamic, packed_layer, packed_tokens

HEADS, DIM = 2, 4


def encode(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A code that tells which token it is of, and how often one has been coded."""
    encode.calls.append(keys.shape[2])  # pyright: ignore
    codes = keys[:, 0, :, :1].to(torch.uint8)
    return codes, values[:, 0, :, :2].bfloat16()


@pytest.fixture(autouse=True)
def calls() -> list[int]:
    encode.calls = []  # pyright: ignore
    return encode.calls  # pyright: ignore


def numbered(count: int, batch: int = 1, start: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values whose numbers are the tokens'."""
    x = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].expand(batch, HEADS, count, DIM)
    return x.clone(), x.clone()


def filled(layer: PackedLayer, sizes: tuple[int, ...], batch: int = 1, padding: Tensor | None = None) -> list:
    held, at = [], 0
    for size in sizes:
        held.append(layer.append(*numbered(size, batch, at), encode, padding))
        at += size
    return held


@pytest.mark.parametrize("sizes", [(100,), (1,) * 100, (7, 1, 64, 28), (3, 97)])
@pytest.mark.parametrize(("recent", "window"), [(8, None), (5, None), (64, None), (8, 20), (8, 5), (64, 64), (8, 2)])
def test_every_query_finds_every_token(sizes, recent, window):
    """Exact tokens are the newest up to each query; all before have codes, if the window reaches them."""
    layer, at = PackedLayer(3, recent, window), 0
    for held, size in zip(filled(layer, sizes), sizes, strict=True):
        begin, at = at, at + size
        assert held.total == at
        exact, codes = at - held.keys.shape[2], held.codes.shape[1]
        assert torch.equal(held.keys[0, 0, :, 0], torch.arange(exact, at).float())
        assert held.codes[0, :, :1].flatten().tolist() == list(range(held.begin, held.begin + codes))
        reach = 0 if window is None else max(0, begin - window + 1)
        assert held.begin <= reach
        assert exact <= max(0, begin - min(recent, layer.recent) + 1)
        assert codes == 0 or held.begin + codes >= at - layer.recent
        if codes and window is None:
            assert held.first.tolist() == [[0, 1, 2]]
            assert torch.equal(held.first_keys[0, 0, : min(3, codes), 0], torch.arange(3)[: min(3, codes)].float())
    assert layer.get_seq_length() == 100
    assert window is None or layer.first_keys is None


@pytest.mark.parametrize("sizes", [(100,), (1,) * 100, (7, 1, 64, 28)])
def test_a_token_is_coded_once(sizes, calls):
    layer = PackedLayer(3, 8)
    filled(layer, sizes)
    assert sum(calls) == layer.coded
    assert all(count % 8 == 0 for count in calls) or len(sizes) < 100


@pytest.mark.parametrize("context", [1, 7, 8, 9, 20, 64, 255, 256, 257, 400, 1000])
@pytest.mark.parametrize(("recent", "window"), [(8, None), (64, None), (8, 20), (64, 20), (64, 300), (8, 2)])
def test_tokens_are_counted_as_they_are_kept(context, recent, window):
    """`packed_tokens` tells the tokens with memory for codes and the exact ones, at once and token by token."""
    for sizes in ((context,), (1,) * context):
        layer = PackedLayer(3, recent, window)
        filled(layer, sizes)
        memory = 0 if layer.codes is None else layer.codes.shape[1]
        assert (memory, layer.keys.shape[2]) == packed_tokens(recent, context, window)
        assert memory % CHUNK == 0
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes, "a view keeps more than its bytes"


def test_first_tokens_follow_the_padding():
    """Of rows that begin with 0, 2 and 20 hidden slots, also where padding ends in a later call."""
    padding = torch.tensor([0, 2, 20])
    for sizes in ((40,), (1,) * 40, (10, 5, 25)):
        layer = PackedLayer(3, 4)
        held, at = None, 0
        for size in sizes:
            seen = padding.clamp_max(at + size)
            held = layer.append(*numbered(size, 3, at), encode, seen)
            at += size
        assert held is not None
        assert held.first.tolist() == [[0, 1, 2], [2, 3, 4], [20, 21, 22]]
        assert torch.equal(held.first_keys[:, 0, :, 0].long(), held.first)


def test_batches_can_be_reordered_repeated_and_chosen():
    layer = PackedLayer(3, 8)
    x = torch.randn(2, HEADS, 30, DIM)
    layer.append(x, x, encode)
    before = [tensor.clone() for tensor in layer.stored()]
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    for found, expected in zip(layer.stored(), before, strict=True):
        assert torch.equal(found, expected[[1, 0]])
    layer.offload()
    layer.prefetch()
    other = copy.deepcopy(layer)
    other.append(x[:, :, :9], x[:, :, :9], encode)
    assert (layer.total, other.total) == (30, 39)
    layer.reset()
    assert (layer.get_seq_length(), layer.stored()) == (0, [])


def test_a_recorded_past_comes_back():
    """Exact tokens and codes are those of a layer that never saw the removed tokens; memory is as small afterwards."""
    for window in (None, 20):
        layer, expected = PackedLayer(3, 8, window), PackedLayer(3, 8, window)
        filled(layer, (40,))
        layer.activate_past_recording()
        layer.append(*numbered(30, start=40), encode)
        layer.append(*numbered(1, start=70), encode)
        layer.crop(-11)
        filled(expected, (60,))
        assert torch.equal(layer.keys, expected.keys)
        assert layer.total == expected.total
        for each in (layer, expected):
            held = each.append(*numbered(5, start=60), encode)
            end = held.begin + held.codes.shape[1]
            assert end >= 57
            assert held.codes[0, :, 0].tolist() == list(range(held.begin, end))
        layer.crop(0)
        assert [tensor.shape for tensor in layer.stored()] == [tensor.shape for tensor in expected.stored()]
        assert layer.begin == expected.begin


def test_layers_take_the_place_of_empty_ones_only():
    cache = DynamicCache()
    layer = packed_layer(cache, 2, 3, 8, None)
    assert [type(each) for each in cache.layers] == [DynamicLayer, DynamicLayer, PackedLayer]
    assert packed_layer(cache, 2, 3, 8, None) is layer
    cache.update(*numbered(4), 0)
    with pytest.raises(ValueError, match="tokens of another model"):
        packed_layer(cache, 0, 3, 8, None)
    with pytest.raises(NotImplementedError, match="give other models an empty cache of their own"):
        cache.update(*numbered(4), 2)


def test_a_recorded_past_is_taken_over():
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(20))
    cache.activate_past_recording()
    assert packed_layer(cache, 0, 3, 8, 20).record_past


def test_static_layers_become_dynamic():
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=2, sliding_window=8, layer_types=kinds)
    cache = StaticCache(config=config, max_cache_len=32)
    all_dynamic(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    assert cache.layers[0].sliding_window == 8
