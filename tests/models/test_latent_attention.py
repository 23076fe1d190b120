"""Compressed models of every architecture: the original's numbers at full rank, one result by every way of decoding."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mea.models.cache import PreallocatedCache
from mea.models.latent_attention import SUPPORTED, HeadMixing
from mea.ops.cache_forms import FORMS
from tiny_models import EVEN, FULL, REDUCED, SLIDING, VOCABULARY, WINDOW, compress, generate, stock, tokens

EXACT = 1e-4  # what a conversion is held to in fp32


@pytest.fixture(params=SUPPORTED)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture
def ranks(form) -> tuple:
    return EVEN if form == "joint" else REDUCED


@pytest.fixture
def original(kind):
    return stock(kind)


@pytest.fixture
def model(original, ranks, form):
    return compress(original, ranks, form)


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def test_full_rank_has_the_logits_of_the_original(original, form):
    ids = tokens(length=3 * WINDOW)
    expected = logits(original, ids)
    assert expected.std() > 0.05, "a model that says nothing shows nothing"
    for implementation in ("sdpa", "eager"):
        full = compress(original, FULL, form)
        full.set_attn_implementation(implementation)
        for reading in ("auto", "absorbed", "materialised"):
            for layer in full.model.layers:
                layer.self_attn.reading = reading
            error = (logits(full, ids) - expected).abs().max()
            assert error <= EXACT, f"{implementation}, {reading}"


def test_full_rank_generates_what_the_original_does(original, form):
    ids = tokens(length=2 * WINDOW)
    torch.testing.assert_close(generate(compress(original, FULL, form), ids), generate(original, ids))


def test_reduced_rank_is_another_model(original, model):
    ids = tokens()
    assert (logits(model, ids) - logits(original, ids)).abs().max() > 100 * EXACT


@pytest.mark.parametrize("length", [3, 2 * WINDOW])
def test_generation_is_equal_across_caches(model, kind, length):
    """Prompts shorter and longer than the window; every cache ends beyond it."""
    ids = tokens(length=length)
    expected = generate(model, ids, use_cache=False)
    dynamic = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, past_key_values=dynamic), expected)
    assert any(layer.is_sliding for layer in dynamic.layers) == (kind in SLIDING)
    static = StaticCache(config=model.config, max_cache_len=length + 20)
    assert torch.equal(generate(model, ids, past_key_values=static), expected)
    assert torch.equal(generate(model, ids, past_key_values=PreallocatedCache(model.config, 5)), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


def test_both_readings_decode_alike(model):
    ids = tokens()
    generated = []
    for reading in ("absorbed", "materialised"):
        for layer in model.model.layers:
            layer.self_attn.reading = reading
        generated.append(generate(model, ids, max_new_tokens=20))
    assert torch.equal(*generated)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "temperature": 1.5}, {"num_beams": 3}],
    ids=["sampling", "beams"],
)
def test_choosing_tokens_otherwise(model, options):
    ids, generated = tokens(), []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(1)
        generated.append(generate(model, ids, max_new_tokens=8, **options, **cache))
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])


@pytest.mark.parametrize(("implementation", "cache"), [("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "dynamic")])
def test_a_padded_row_is_the_row_by_itself(model, cache, implementation):
    model.set_attn_implementation(implementation)
    short, long = tokens(1, 5), tokens(1, 2 * WINDOW)
    padding = torch.zeros(1, long.shape[1] - 5, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, short], 1), long])
    mask = (batch != 0).long()
    options = {"cache_implementation": cache, "max_new_tokens": 8}
    together = generate(model, batch, attention_mask=mask, **options)[:, long.shape[1] :]
    for row, ids in zip(together, (short, long), strict=True):
        assert torch.equal(row, generate(model, ids, **options)[0, ids.shape[1] :])


def test_rows_of_unequal_length_can_be_continued_in_two_ways(model):
    """Rows end in padding, which stays in the cache: continued as `generate` numbers tokens, and without a number."""
    ids, shorter = tokens(2, WINDOW - 1), 3
    mask = torch.ones(2, WINDOW + 2, dtype=torch.long)
    mask[0, shorter : WINDOW - 1] = 0
    for positions in (mask.cumsum(-1) - 1, torch.arange(WINDOW + 2).expand(2, -1)):
        more = torch.cat([ids, tokens(2, 3)], 1)
        expected = logits(model, more, attention_mask=mask, position_ids=positions, use_cache=False)
        for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=16)):
            cache, found = make(config=model.config), []
            for part in (slice(0, WINDOW - 1), slice(WINDOW - 1, WINDOW), slice(WINDOW, WINDOW + 2)):
                options = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
                found.append(logits(model, more[:, part], past_key_values=cache, **options))
            seen = mask.bool()
            torch.testing.assert_close(torch.cat(found, 1)[seen], expected[seen], atol=EXACT, rtol=0)


def test_sequences_packed_into_a_row_do_not_see_each_other(model):
    """The second sequence's positions begin at 0 again; it is also continued over the cache."""
    first, second = tokens(1, 5), tokens(1, 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = logits(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed[:, :5], logits(model, first), atol=EXACT, rtol=0)
    torch.testing.assert_close(packed[:, 5:], logits(model, second), atol=EXACT, rtol=0)


def test_a_cropped_cache_goes_on_as_if_nothing_had_been_there(model):
    ids = tokens(length=WINDOW - 1)
    for cache in (DynamicCache(config=model.config), PreallocatedCache(model.config, 3)):
        logits(model, ids, past_key_values=cache, use_cache=True)
        cache.crop(-3)
        other = torch.cat([ids[:, :-3], tokens(length=4)], 1)
        continued = logits(model, other[:, -4:], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(continued, logits(model, other)[:, -4:], atol=EXACT, rtol=0)


def test_a_prompt_is_read_once_for_several_continuations(model):
    prompt = tokens(length=2 * WINDOW)
    read = DynamicCache(config=model.config)
    logits(model, prompt, past_key_values=read, use_cache=True)
    for _ in range(2):
        ids = torch.cat([prompt, tokens(length=3)], 1)
        reused = generate(model, ids, past_key_values=copy.deepcopy(read))
        assert torch.equal(reused, generate(model, ids, use_cache=False))


def test_a_single_long_sequence_is_read_in_parts(kind, monkeypatch):
    """Enough tokens to be cut for several cores, at full rank against the original."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    original = stock(kind, **({"sliding_window": 1600} if kind in SLIDING else {}))
    ids = torch.randint(1, VOCABULARY, (1, 1541))
    full, caches = compress(original, FULL), []
    for each in (original, full):
        caches.append(DynamicCache(config=each.config))
        logits(each, ids[:, :-2], past_key_values=caches[-1], use_cache=True, logits_to_keep=1)
    for token in ids[:, -2:].T:
        expected, found = (
            logits(each, token[None], past_key_values=cache)
            for each, cache in zip((original, full), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def test_bf16_errs_no_more_than_twice_as_much_as_the_original(original, form):
    ids = tokens(4, 3 * WINDOW)
    exact, full = logits(original, ids), compress(original, FULL, form)

    def error(model):
        return (logits(model.bfloat16(), ids).float() - exact).square().mean().sqrt()

    assert error(full) <= 2 * error(original)


def test_the_cache_holds_exactly_the_latents(model, ranks):
    """Bytes are ranks x tokens x size of a number, and a token's latents lie together."""
    ids = tokens(2, 30)
    for dtype in (torch.float32, torch.bfloat16):
        cache = DynamicCache(config=model.config)
        logits(model.to(dtype), ids, past_key_values=cache, use_cache=True)
        for layer, pair in zip(cache.layers, ranks, strict=True):
            held = WINDOW - 1 if layer.is_sliding else 30
            per_token = sum(pair) if pair else 2 * 24
            assert layer.keys.nbytes + layer.values.nbytes == 2 * held * per_token * dtype.itemsize
            if pair:
                assert layer.keys.shape == (2, 1, held, pair[0])
                assert layer.keys.stride()[2:] == (pair[0], 1)


def test_factors_can_be_trained(model):
    ids = tokens()
    model.train()
    model(ids, labels=ids).loss.backward()
    mixings = [module for module in model.modules() if isinstance(module, HeadMixing)]
    assert len(mixings) == 2
    for mixing in mixings:
        for name, parameter in mixing.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.compile
@pytest.mark.parametrize("form", ["post_rope", "joint"], indirect=True)
def test_a_decoding_step_compiles_to_one_graph(model, kind):
    """With a static cache, as `generate` compiles; every further token uses the same graph."""
    torch.compiler.reset()
    ids = tokens(2, 6)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    for cache in caches:
        logits(model, ids, past_key_values=cache)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for token in tokens(2, 3).T[..., None]:
            expected = logits(model, token, past_key_values=caches[0])
            torch.testing.assert_close(logits(compiled, token, past_key_values=caches[1]), expected, atol=EXACT, rtol=0)


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch([[1, 2, 3], [4, 5]])


def test_other_attention_is_not_converted():
    from transformers import OlmoConfig, OlmoForCausalLM

    from mea.models.latent_attention import to_latent_attention

    config = OlmoConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with pytest.raises(TypeError, match="supported: llama, mistral"):
        to_latent_attention(OlmoForCausalLM(config).model.layers[0].self_attn, 4, 4)
