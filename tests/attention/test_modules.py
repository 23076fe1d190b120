"""Every module against the reference mathematics: forward and all gradients, at awkward sizes, under every mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mea.attention import KVCache
from mea.ops.masks import attention_mask


def terms(module, tokens: int, batch: int = 2) -> int:
    """Lengths of the contractions on the way to an output or a gradient: projections, scores, reads, sums of tokens."""
    d, heads = module.head_dim, module.num_heads
    forward = 2 * module.hidden_size + 2 * d * heads + 2 * tokens + 2 * d
    return 2 * forward + batch * tokens


def grads(module, x, out) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weight).sum(), [x, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize(("tokens", "head_dim"), [(63, 60), (111, 100)])
def test_forward_and_every_gradient(case, tokens, head_dim, oracle, agree):
    module = case.build(head_dim)
    x = torch.randn(2, tokens, module.hidden_size, dtype=torch.float64, requires_grad=True)
    actual, expected = module(x), oracle(module, x, attention_mask(tokens))
    agree(actual, expected, terms(module, tokens))
    actual, expected = grads(module, x, actual), grads(module, x, expected)
    for name in expected:
        agree(actual[name], expected[name], terms(module, tokens), f"gradient of {name}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_forward_at_any_size(data, cases, oracle, agree):
    case = cases[data.draw(st.sampled_from(list(cases)))]
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    module = case.build(4 * data.draw(st.integers(1, 12)))
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    x = torch.randn(batch, tokens, module.hidden_size, dtype=torch.float64)
    agree(module(x), oracle(module, x, attention_mask(tokens)), terms(module, tokens))


@pytest.mark.parametrize(
    "options", [{"window": 9}, {"causal": False}, {"causal": False, "window": 9}], ids=["window", "full", "band"]
)
def test_masks_of_the_module(case, options, oracle, agree):
    module = case.build(**options)
    x = torch.randn(2, 63, module.hidden_size, dtype=torch.float64)
    agree(module(x), oracle(module, x, attention_mask(63, **options)), terms(module, 63))


def test_eager_backend(case, oracle, agree):
    module = case.build(backend="eager")
    x = torch.randn(2, 63, module.hidden_size, dtype=torch.float64)
    agree(module(x), oracle(module, x, attention_mask(63)), terms(module, 63))


def test_padding_changes_nothing_for_real_tokens(case, agree):
    module = case.build()
    x = torch.randn(2, 40, module.hidden_size, dtype=torch.float64)
    alone = module(x[:1, 13:])
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :13] = False
    batch = module(x, mask=attention_mask(40, padding=padding))
    # The row's positions start 13 later than in the pass without padding; their angles carry rounding of 40 eps.
    agree(batch[:1, 13:], alone, terms(module, 40) + 2 * 40)
    assert batch.isfinite().all()


def test_padding_alone_has_finite_gradients(case):
    module = case.build()
    x = torch.randn(1, 7, module.hidden_size, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False] * 4 + [True] * 3])
    out = module(x, mask=attention_mask(7, padding=padding))
    assert all(grad.isfinite().all() for grad in grads(module, x, out).values())


def test_packed_documents_are_strangers(case, agree):
    module = case.build()
    x = torch.randn(1, 40, module.hidden_size, dtype=torch.float64)
    lengths = (7, 20, 13)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = module(x, mask=attention_mask(40, documents=documents), positions=positions)
    alone = torch.cat([module(part) for part in x.split(lengths, dim=1)], dim=1)
    agree(packed, alone, terms(module, 40))


def test_no_token_sees_a_later_one(case):
    module = case.build()
    x = torch.randn(1, 12, module.hidden_size, dtype=torch.float64)
    changed = torch.cat([x[:, :7], torch.randn(1, 5, module.hidden_size, dtype=torch.float64)], dim=1)
    out, other = module(x), module(changed)
    assert torch.equal(out[:, :7], other[:, :7])
    assert not (out == other)[:, 7:].any()


@pytest.mark.parametrize("window", [None, 6])
def test_cached_decoding_is_the_full_pass(case, window, agree):
    module = case.build(window=window)
    x = torch.randn(2, 19, module.hidden_size, dtype=torch.float64)
    cache, layer = KVCache(), module.layer_index
    parts = [module(part, cache=cache) for part in x.split((7, 1, 3, 1, 1, 6), dim=1)]
    assert cache.get_seq_length(layer) == 19
    agree(torch.cat(parts, dim=1), module(x), terms(module, 19))


def test_padded_rows_decode_as_in_the_full_pass(case, agree):
    """The padding is on the left, so that the rows' first tokens are at different places in the cache."""
    module = case.build()
    x = torch.randn(2, 19, module.hidden_size, dtype=torch.float64)
    padding = torch.arange(19) >= torch.tensor([[5], [0]])
    cache, seen, parts = KVCache(), 0, []
    for part in x.split((9, 1, 1, 3, 1, 4), dim=1):
        seen += part.shape[1]
        mask = attention_mask(part.shape[1], seen, padding=padding[:, :seen])
        parts.append(module(part, mask=mask, cache=cache))
    full = module(x, mask=attention_mask(19, padding=padding))
    agree(torch.cat(parts, dim=1), full, terms(module, 19))


def test_positions_may_be_given_as_angles(case):
    module = case.build()
    x = torch.randn(2, 19, module.hidden_size, dtype=torch.float64)
    positions = torch.arange(5, 24)[None]
    if module.rope is None:
        assert torch.equal(module(x, positions=positions), module(x))
        return
    turn = module.rotary(positions, x.dtype)
    assert torch.equal(module(x, positions=turn), module(x, positions=positions))


def test_checkpointing_repeats_the_same_gradients(case):
    module = case.build()
    x = torch.randn(2, 19, module.hidden_size, dtype=torch.float64, requires_grad=True)
    plain = grads(module, x, module(x))
    repeated = grads(module, x, checkpoint(module, x, use_reentrant=False))
    for name, grad in plain.items():
        assert torch.equal(repeated[name], grad), name


def test_bf16_is_no_worse_than_the_reference_in_bf16(case, oracle):
    """flash-attention's rule: at most twice the error that plain PyTorch makes in the same precision."""
    module = case.build(60)
    x = torch.randn(2, 63, module.hidden_size, dtype=torch.float64).bfloat16()
    module = module.bfloat16()
    mask = attention_mask(63)
    plain, actual = oracle(module, x, mask), module(x)
    exact = oracle(module.double(), x.double(), mask)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_autocast_runs_in_bf16(case):
    module = case.build(dtype=torch.float32)
    x = torch.randn(2, 19, module.hidden_size, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads(module, x, out).values())
