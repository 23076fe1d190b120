"""Quantised caches: rounding errors, the promised bytes, and the same result for tokens in any portions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mea.evaluate.through_cache import ThroughCache, reading_in
from mea.models.quantized_cache import BITS, CacheFormat, QuantisedCache, QuantisedLayer
from mea.ops import cpu
from mea.ops.cache_forms import FORMS
from mea.ops.codes import pack, unpack
from tiny_models import EVEN, compress, stock

ALONG = ("channel", "token")
TOKENS = 100


def random_states(widths=(24, 40), heads=1, batch=2):
    return [torch.randn(batch, heads, TOKENS, width) * 3 + 5 for width in widths]


def filled(form, states, sizes=(37, 1, 1, 61)):
    layer, done = QuantisedLayer(form), 0
    for size in sizes:
        layer.update(*(x[:, :, done : done + size] for x in states))
        done += size
    nothing = [x[:, :, :0] for x in states]
    return layer, layer.update(*nothing)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 24])
def test_packing_is_lossless(bits, width):
    codes = torch.randint(2**bits, (3, 2, width)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == sum(-(-width * part // 8) for part in ((2, 1) if bits == 3 else (bits,)))
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize(("widths", "heads"), [((24, 40), 1), ((36, 7), 1), ((8, 8), 3)])
def test_error_is_at_most_half_a_step_and_new_tokens_are_exact(bits, along, widths, heads):
    """A step is the range of a group over its codes; 16-bit scales add 2^-7 of the largest number to the range."""
    form = CacheFormat(bits, along, along, block=16, first=3, group=12)
    states = random_states(widths, heads)
    layer, read = filled(form, states)
    for x, y in zip(states, read, strict=True):
        span, largest = (x.amax() - x.amin()).item(), x.abs().amax().item()
        bound = 0.51 * (span + 2**-7 * largest) / (2**bits - 1)
        assert (x - y).abs().max() <= bound
        exact = (TOKENS - form.first) % form.block
        assert torch.equal(y[:, :, : form.first], x[:, :, : form.first])
        assert torch.equal(y[:, :, -exact:], x[:, :, -exact:])
        assert not torch.equal(y[:, :, form.first : -exact], x[:, :, form.first : -exact])
    assert layer.get_seq_length() == TOKENS


def test_blocks_are_quantised_once_however_the_tokens_come():
    form, states = CacheFormat(4, block=16, first=3), random_states()
    _, at_once = filled(form, states, (TOKENS,))
    _, one_by_one = filled(form, states, (1,) * TOKENS)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_codes_scales_and_exact_tokens(bits):
    form = CacheFormat(bits, "channel", "token", block=16, first=4, group=8)
    layer, _ = filled(form, random_states((24, 40), batch=1))
    quantised = 96  # of 100 tokens: 4 first ones, then 6 full blocks
    scales = 2 * 2 * (quantised // 16 * 24 + quantised * 40 // 8)
    assert sum(x.nbytes for x in layer.stored()) == quantised * 64 * bits // 8 + scales + 4 * 64 * 4


@given(
    power=st.integers(-24, 24),
    bits=st.sampled_from(BITS),
    along=st.sampled_from(ALONG),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_no_power_of_two_changes_the_codes(power, bits, along, dtype, seed):
    """A model may scale its values by any power of two and undo it behind attention."""
    generator = torch.Generator().manual_seed(seed)
    states = [(torch.randn(1, 2, TOKENS, 16, generator=generator) * 3 + 5).to(dtype) for _ in range(2)]
    form = CacheFormat(bits, along, along, block=16, group=8)
    for x, y in zip(filled(form, states)[1], filled(form, [x * 2.0**power for x in states])[1], strict=True):
        assert torch.equal(x * 2.0**power, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_huge_number_spoils_its_own_group_only(dtype):
    """Values of -125,000 occur in public models: fp16 cannot hold them."""
    states = [x.to(dtype) for x in random_states((32, 32))]
    expected = filled(CacheFormat(8, block=16, group=8), states)[1][1]
    for x in states:
        x[0, 0, 50, 3] = -125_000.0
    for x, y in zip(states, filled(CacheFormat(8, block=16, group=8), states)[1], strict=True):
        assert ((x - y).abs().amax() <= 0.51 * 125_100 / 255).item()
    changed = (y != expected).any(1)
    assert changed[0, 50, :8].any()
    changed[0, 50, :8] = False
    assert not changed.any()


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_reads_what_pytorch_reads(bits, monkeypatch):
    states = [x.bfloat16() for x in random_states((96, 24), heads=2)]  # where there is no kernel, one thing twice
    form = CacheFormat(bits, block=16)
    found = filled(form, states)[1]
    monkeypatch.setattr(cpu, "library", lambda: None)
    for x, y in zip(found, filled(form, states)[1], strict=True):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=0)  # the neighbour in bf16: fp32 is rounded once less


def test_constant_groups_and_zeros_are_exact():
    form = CacheFormat(2, block=8, first=0)
    states = [torch.full((1, 1, 8, 4), 3.0), torch.zeros(1, 1, 8, 4)]
    layer = QuantisedLayer(form)
    layer.update(*states)
    for x, y in zip(states, layer.update(*(x[:, :, :0] for x in states)), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-4)


def test_batches_can_be_reordered_repeated_and_chosen():
    form, states = CacheFormat(4, block=16), random_states()
    layer, read = filled(form, states)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    for x, y in zip(read, layer.update(*(x[:, :, :0] for x in states)), strict=True):
        assert torch.equal(y, x[[1, 0]])
    with pytest.raises(NotImplementedError, match="cannot remove tokens"):
        layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.stored()


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"keys": "head"}, {"values": ""}, {"block": 4}, {"first": -1}, {"group": 0}]
)
def test_impossible_formats_are_refused(options):
    with pytest.raises(ValueError, match="not"):
        CacheFormat(**options)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_model_decodes_over_a_quantised_cache(kind):
    """Eight bits move the logits of a random model little, two bits more; sliding layers stay as they are."""
    model = stock(kind)
    ids = torch.randint(3, 99, (1, 60))
    expected = model(input_ids=ids).logits
    errors = []
    for bits in (8, 2):
        cache = QuantisedCache(model.config, CacheFormat(bits, block=8, first=2))
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(7, dim=1)]
        errors.append((torch.cat(parts, 1) - expected).abs().mean().item())
    scale = expected.abs().mean().item()
    assert errors[0] < 0.02 * scale
    assert errors[0] < errors[1]
    assert any(isinstance(layer, QuantisedLayer) for layer in cache.layers)


@torch.no_grad()
def test_generate_takes_the_cache_also_with_beams():
    model = stock("llama")
    ids = torch.randint(3, 99, (2, 20))
    for options in ({}, {"num_beams": 2}):
        cache = QuantisedCache(model.config, CacheFormat(8, block=8))
        output = model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache, **options)
        assert output.shape == (2, 32)
        assert cache.get_seq_length() == 31


@torch.no_grad()
def test_scaled_values_give_the_same_logits():
    """`v_proj` times 2^17 and `o_proj` times 2^-17 are the same model."""
    model, ids = stock("llama"), torch.randint(3, 99, (1, 40))

    def logits():
        cache = QuantisedCache(model.config, CacheFormat(8, block=8, first=2))
        return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(5, 1)], 1)

    expected = logits()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight *= 2.0**17
        layer.self_attn.o_proj.weight *= 2.0**-17
    assert torch.equal(logits(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_latents_is_refused(form):
    with pytest.raises(ValueError, match=r"compressed already, .* leave out cache bits"):
        QuantisedCache(compress(stock("llama"), EVEN, form).config, 4)


def test_reading_in_blocks_equals_decoding_token_by_token():
    model = stock("llama")
    row = torch.randint(3, 99, (50,))
    form = CacheFormat(2, block=8, first=3)
    read = reading_in(form)
    assert read is not None
    slowly = ThroughCache(lambda config: QuantisedCache(config, form), block=1)
    torch.testing.assert_close(read(model, row), slowly(model, row), rtol=1e-4, atol=1e-4)
    at_once = ThroughCache(lambda config: QuantisedCache(config, form), block=50)
    assert (read(model, row) - at_once(model, row)).abs().max() > 1e-2
