"""Models that pack their caches: one result however a text is cut into calls, padded, batched or decoded."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, pipeline

from coded_models import ALL, FIRST, RECENT, coded, original
from mea.models.cache import PreallocatedCache
from mea.models.latent_attention import SUPPORTED
from mea.models.packed_cache import PackedLayer
from mea.models.quantized_cache import QuantisedCache
from tiny_models import SLIDING, VOCABULARY, WINDOW, generate, tokens

# fp64 sums of about 10^3 terms in all (hidden sizes, head dimensions, tokens, layers), each off by 2^-53, with the
# factor 2^10 for residual streams that grow. Rotary angles are fp32, but the same where positions are the same.
EXACT = 2**10 * 1000 * 2**-53
READINGS = ("predictive", "joint")
SOME = [("llama", "predictive"), ("llama", "joint"), ("mistral", "predictive"), ("gemma3_text", "joint")]


@pytest.fixture(params=[(kind, reading) for kind in SUPPORTED for reading in READINGS], ids="-".join)
def made(request) -> Any:
    return coded(*request.param)


@pytest.fixture(params=SOME, ids="-".join)
def some(request) -> Any:
    return coded(*request.param)


@pytest.fixture(params=READINGS)
def reading(request) -> str:
    return request.param


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def padded(mask, count):
    """Arguments for the last tokens under a mask; positions as `generate` gives them."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -count:]}


def through(model, ids, sizes, **options):
    """Logits with the model's own cache, and the cache, for a text in calls of these sizes."""
    past, found, at = options.pop("past", None), [], 0
    mask = options.pop("mask", None)
    for size in sizes:
        given = {} if mask is None else padded(mask[:, : at + size], size)
        with torch.no_grad():
            out = model(ids[:, at : at + size], past_key_values=past, use_cache=True, **given)
        past, at = out.past_key_values, at + size
        found.append(out.logits)
    return torch.cat(found, 1), past


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)


def test_a_text_has_the_same_logits_however_it_is_cut(made):
    """At once without a cache, at once with one, token by token, and in odd chunks: the same numbers."""
    ids = tokens(length=3 * WINDOW + 7)
    expected = logits(made, ids, use_cache=False)
    length = ids.shape[1]
    for sizes in ((length,), (1,) * length, (3, 13, 5, 1, 1, length - 23), (2, 1, length - 3)):
        close(through(made, ids, sizes)[0], expected)


def test_codes_are_read(made):
    """The logits are those of the original for the tokens that nothing but exact tokens precede, and others after."""
    ids = tokens(length=40)
    model = original(made.config.model_type.removeprefix("mea_")).double()
    difference = (logits(made, ids) - logits(model, ids)).abs().amax((0, 2))
    assert difference[:RECENT].max() <= EXACT
    assert difference[RECENT + FIRST :].min() > 100 * EXACT


def test_left_padding_changes_nothing(made):
    """Rows with 0 to 9 and 137 padding tokens are the rows by themselves, at once and over the cache."""
    length, paddings = 150, (*range(10), 137)
    ids = tokens(len(paddings), length)
    mask = (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()
    ids = ids * mask
    at_once = logits(made, ids, use_cache=False, **padded(mask, length))
    cached = through(made, ids, (1, 4, 3, 60, 78, *(1,) * 4), mask=mask)[0]
    for row, padding in enumerate(paddings):
        if row in (2, 3, 5, 6, 8):  # only some by themselves, for time
            continue
        expected = logits(made, ids[row : row + 1, padding:], use_cache=False)[0]
        for found in (at_once, cached):
            close(found[row, padding:], expected)
    close(cached[mask.bool()], at_once[mask.bool()])
    # By default transformers counts padding in positions: the same angles between tokens, up to 2^-24 times the angle.
    # A code may flip at that, so most numbers are near, not all.
    found = logits(made, ids, attention_mask=mask, use_cache=False)[mask.bool()]
    assert (found - at_once[mask.bool()]).abs().quantile(0.9) <= 1000 * 2**-24


def test_rows_of_a_batch_generate_what_they_do_alone(some):
    short, long = tokens(1, 4), tokens(1, 2 * WINDOW + 3)
    padding = torch.zeros(1, long.shape[1] - 4, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, short], 1), long])
    together = generate(some, batch, attention_mask=(batch != 0).long())[:, long.shape[1] :]
    for row, ids in zip(together, (short, long), strict=True):
        assert torch.equal(row, generate(some, ids)[0, ids.shape[1] :])


def test_greedy_tokens_are_the_largest_logits_of_whole_passes(made):
    ids = tokens(1, 6)
    found = generate(made, ids, max_new_tokens=20)
    expected = logits(made, found, use_cache=False)[:, 5:-1].argmax(-1)
    assert torch.equal(found[:, 6:], expected)


@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize(("kind", "reading"), SOME)
def test_generation_is_equal_across_caches(kind, reading, ordinary):
    """Prompts shorter and longer than the window, caches of every kind that is ordinary while it is empty.

    In models with ordinary layers too, whose static cache is made a dynamic one.
    """
    model = coded(kind, reading, ordinary=ordinary)
    for length in (3, 2 * WINDOW):
        ids = tokens(length=length)
        expected = generate(model, ids, use_cache=False)
        for options in (
            {},
            {"past_key_values": DynamicCache(config=model.config)},
            {"past_key_values": DynamicCache()} if kind == "llama" or not ordinary else {},
            {"past_key_values": StaticCache(config=model.config, max_cache_len=length + 20)},
            {"cache_implementation": "static"},
        ):
            assert torch.equal(generate(model, ids, **options), expected), options


@pytest.mark.parametrize(("kind", "reading"), SOME)
def test_static_caches_outside_generate(kind, reading):
    """An empty one is packed if all layers are; otherwise masks would be as wide as its ordinary layers."""
    ids = tokens(length=20)
    model = coded(kind, reading, ordinary=False)
    cache = StaticCache(config=model.config, max_cache_len=32)
    close(through(model, ids, (11, *(1,) * 9), past=cache)[0], logits(model, ids, use_cache=False))
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match=r"some layers only.*instead of a static cache"):
        logits(coded(kind, reading), ids, past_key_values=cache)


def test_choosing_tokens_otherwise(some):
    """Beams reorder the cache, and several sequences repeat it."""
    ids = tokens(2, 2 * WINDOW)
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    ):
        results = []
        for cache in ({"use_cache": False}, {}):
            torch.manual_seed(1)
            results.append(generate(some, ids, max_new_tokens=8, **options, **cache))
        assert torch.equal(*results)


def test_a_prompt_is_read_once_for_several_continuations(some):
    prompt = tokens(length=2 * WINDOW)
    _, read = through(some, prompt, (prompt.shape[1],))
    for _ in range(2):
        ids = torch.cat([prompt, tokens(length=3)], 1)
        reused = generate(some, ids, past_key_values=copy.deepcopy(read))
        assert torch.equal(reused, generate(some, ids, use_cache=False))


@pytest.mark.parametrize("removed", [1, 4, 9])
def test_a_recorded_past_goes_on_as_if_nothing_had_been_there(some, removed):
    """Tokens after the beginning of the record are removed; what is left is as exact as it was before them."""
    ids, kept = tokens(length=40), 40 - removed
    _, past = through(some, ids, (20,))
    past.activate_past_recording()
    through(some, ids[:, 20:], (9, 1, 10), past=past)
    past.crop(-removed)
    assert past.get_seq_length() == kept
    other = torch.cat([ids[:, :kept], tokens(length=12)], 1)
    expected = logits(some, other, use_cache=False)[:, kept:]
    close(through(some, other[:, kept:], (3, 1, 1, 7), past=past)[0], expected)


@pytest.mark.parametrize("sizes", [(1,) * 12, (12,), (3, 9)])
def test_what_a_cropped_cache_has_dropped_is_read_by_its_code(reading, sizes):
    """No token is lost: with all components in 8 bits the logits are nearly those of the text itself.

    Eight bits err by 2^-9 of a group's range, of about 6 deviations: 1 % of the keys and values.
    """
    model = coded("llama", reading, ALL)
    ids = tokens(length=40)
    past = through(model, ids, (40,))[1]
    past.crop(-RECENT + 1)
    kept = 41 - RECENT
    other = torch.cat([ids[:, :kept], tokens(length=12)], 1)
    expected = logits(model, other, use_cache=False)[:, kept:]
    found, past = through(model, other[:, kept:], sizes, past=past)
    assert (found - expected).abs().max() <= 0.02 * expected.std()
    past.crop(-past.get_seq_length() + 1)  # into the first tokens
    other = torch.cat([other[:, :1], tokens(length=20)], 1)
    expected = logits(model, other, use_cache=False)[:, 1:]
    found = through(model, other[:, 1:], (4, 1, 1, 1, 1, 12), past=past)[0]
    assert (found - expected).abs().max() <= 0.02 * expected.std()


@pytest.mark.parametrize("kind", SLIDING)
def test_caches_without_windows(kind):
    """An empty DynamicCache is packed with windows if all layers are; ordinary layers would not have them."""
    ids = tokens(length=20)
    model = coded(kind, "joint", ordinary=False)
    close(through(model, ids, (11, *(1,) * 9), past=DynamicCache())[0], logits(model, ids, use_cache=False))
    with pytest.raises(ValueError, match=r"some layers only.*or one without windows"):
        logits(coded(kind, "joint"), ids, past_key_values=DynamicCache())


def test_crop_refuses_what_cannot_be_taken_back():
    model = coded("mistral", "predictive")
    past = through(model, tokens(length=30), (30,))[1]
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        past.crop(-1)
    layer = past.layers[0]
    layer.crop(0)
    for number in (3, -31):
        with pytest.raises(ValueError, match="minus the number of tokens to remove, at most 30"):
            layer.crop(number)


def test_assisted_decoding_generates_what_greedy_decoding_does(some):
    """As the target, as the draft, and with candidates from the prompt."""
    model = original(some.config.model_type.removeprefix("mea_")).double()
    ids = tokens(1, 2 * WINDOW).repeat(1, 2)
    expected = generate(some, ids)
    assert torch.equal(generate(some, ids, assistant_model=model), expected)
    assert torch.equal(generate(some, ids, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, ids, assistant_model=some), generate(model, ids))


@pytest.mark.parametrize("window", [RECENT, RECENT + 1, 20, 200])
@pytest.mark.parametrize(("kind", "reading"), SOME[2:])
def test_windows_shorter_and_longer_than_exact_tokens_and_text(kind, reading, window):
    model = coded(kind, reading, sliding_window=window)
    ids = tokens(length=45)
    expected = logits(model, ids, use_cache=False)
    for sizes in ((1,) * 45, (25, 1, 1, 15, 3)):
        close(through(model, ids, sizes)[0], expected)
    prompt = ids[:, :30]
    expected = generate(model, prompt, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, prompt, **options), expected)


def test_embeddings_instead_of_tokens(some):
    ids = tokens(length=30)
    embedded = some.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        found = some(inputs_embeds=embedded, use_cache=False).logits
    close(found, logits(some, ids, use_cache=False))
    found = some.generate(inputs_embeds=embedded, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, generate(some, ids, max_new_tokens=8)[:, 30:])


def test_pipelines_generate(reading, tokenizer):
    model = coded("llama", reading, vocab_size=256)
    text = "A cache of keys and values, packed into few bits."
    say = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    ids = tokenizer(text, return_tensors="pt").input_ids
    found = say(text, max_new_tokens=8, do_sample=False, return_tensors=True)
    expected = generate(model, ids, max_new_tokens=8, use_cache=False)[0].tolist()
    assert found[0]["generated_token_ids"][-8:] == expected[-8:]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "reading"), SOME[1:])
def test_masks_of_either_kind(kind, reading, implementation):
    """Boolean masks of SDPA and masks that are added to scores say the same.

    Without ordinary layers: eager attention has a softmax in fp32.
    """
    some = coded(kind, reading, ordinary=False)
    some.set_attn_implementation(implementation)
    ids = tokens(length=30)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = through(some, ids, (5, 20, 1, 4), mask=mask)[0]
    some.set_attn_implementation("sdpa")
    close(found[mask.bool()], logits(some, ids, use_cache=False, **padded(mask, 30))[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(made, dtype):
    """Decoding errs no more than whole passes do, twice over: by rounding, and by codes at an edge that flip.

    Both are measured on the model itself, as the distance of its whole pass to that in fp64.
    """
    ids = tokens(4, 40)
    exact = logits(made, ids, use_cache=False)
    # Not .to(dtype): that rounds the rotary frequencies.
    model = copy.deepcopy(made)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    at_once = logits(model, ids, use_cache=False)
    cached = through(model, ids, (11, *(1,) * 29))[0]
    assert at_once.dtype == dtype
    errors = [(found.double() - exact).abs().median() for found in (at_once, cached)]
    assert errors[1] <= 2 * errors[0] + EXACT
    assert errors[0] <= 40 * torch.finfo(dtype).eps * exact.std() + EXACT


def test_every_token_is_coded_once(some):
    """Its code is there when it leaves the exact tokens, and stays the same to the bit."""
    ids = tokens(length=40)
    past, before = None, {}
    for at in range(40):
        past = through(some, ids[:, at : at + 1], (1,), past=past)[1]
        for index, layer in enumerate(past.layers[:-1]):
            assert isinstance(layer, PackedLayer)
            assert layer.begin + layer.coded >= layer.total - layer.recent
            for slot in range(layer.coded):
                now = torch.cat([layer.codes[:, slot], layer.scales[:, slot].view(torch.uint8)], -1)
                then = before.setdefault((index, layer.begin + slot), now.clone())
                assert torch.equal(now, then)


def test_foreign_caches_are_refused(some):
    """A filled cache of another model, and caches of their own kind; a packed one by another model."""
    model = original(some.config.model_type.removeprefix("mea_")).double()
    ids = tokens(length=12)
    filled = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=filled)
    with pytest.raises(ValueError, match=r"tokens of another model.*give an empty DynamicCache, or none"):
        logits(some, ids, past_key_values=filled)
    for other in (QuantisedCache(model.config), PreallocatedCache(some.config, 5)):
        if all(other.is_sliding):
            continue  # of ordinary layers, where the model has windows
        with pytest.raises(ValueError, match="a layer of its own kind"):
            logits(some, ids, past_key_values=other)
    packed = through(some, ids, (12,))[1]
    with pytest.raises(NotImplementedError, match="belongs to a model with a packed cache"):
        logits(model, ids, past_key_values=packed)


def test_a_filled_static_cache_is_refused():
    model = original("llama").double()
    filled = StaticCache(config=model.config, max_cache_len=20)
    logits(model, tokens(length=5), past_key_values=filled)
    with pytest.raises(ValueError, match="tokens of another model"):
        logits(coded("llama", "joint", ordinary=False), tokens(length=1), past_key_values=filled)


def test_weights_of_the_codes_can_be_trained(reading):
    """Gradients pass through the rounding to encoders, decoders and means."""
    model = coded("llama", reading).train()
    ids = tokens(length=30)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[0].self_attn.code.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_are_the_same_with_a_cache(reading):
    """A model that is called without options makes a cache, in training too."""
    ids, gradients = tokens(length=30), []
    for options in ({}, {"use_cache": False}):
        model = coded("llama", reading).train()
        model(ids, labels=ids, **options).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=EXACT, rtol=0)


def test_a_model_that_has_generated_can_be_copied(reading):
    model, ids = coded("llama", reading), tokens(1, 20)
    expected = generate(model, ids)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(generate(other, ids), expected)
    other.train()(ids, labels=ids).loss.backward()


def test_continuous_batching_is_refused(reading):
    with pytest.raises(NotImplementedError, match="continuous batching"):
        coded("llama", reading).generate_batch([[1, 2, 3], [4, 5]])


def test_many_queries_and_many_codes(reading, monkeypatch):
    """Blocks of queries and of codes: sizes change nothing."""
    from mea.models import coded_attention

    model = coded("qwen3", reading)
    ids = torch.randint(1, VOCABULARY, (2, 70))
    expected = through(model, ids, (50, *(1,) * 20))[0]
    monkeypatch.setattr(coded_attention, "QUERIES", 7)
    monkeypatch.setattr(coded_attention, "TOKENS", 9)
    close(logits(model, ids, use_cache=False), expected)
    close(through(model, ids, (50, *(1,) * 20))[0], expected)
