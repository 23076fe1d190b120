"""What the constructors promise beside the mathematics: initial values, cache sizes, folding, errors."""

import pytest
import torch

from mea.attention import (
    METHODS,
    DifferentialAttention,
    GroupedQueryAttention,
    InterleavedHeadAttention,
    KnockingHeadsAttention,
    KVCache,
    ModifiedTalkingHeadsAttention,
    MultiheadExplicitAttention,
    TalkingHeadsAttention,
    by_name,
)
from mea.attention.backends import _short_rows
from mea.attention.mixing import NOISE, FrequencyMixing, HeadMixing


def test_identity_starts_as_the_plain_attention(agree):
    plain = GroupedQueryAttention(48, 4, 2)
    module = MultiheadExplicitAttention(48, 4, 2, head_norm="off", init="identity", fold="never")
    module.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 11, 48)
    agree(module(x), plain(x), terms=2 * 48 + 2 * 11 + 2 * 12)


def test_knocking_heads_start_as_the_plain_attention():
    plain, module = GroupedQueryAttention(48, 4, 2), KnockingHeadsAttention(48, 4, 2)
    module.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 11, 48)
    assert torch.equal(module(x), plain(x))


def test_fewer_components_start_as_block_copies():
    expected = torch.tensor([[1, 1, 0, 0.0], [0, 0, 1, 1]])
    assert torch.equal(HeadMixing(2, 4, "identity").weight, expected)
    weight = FrequencyMixing(2, 4, head_dim=6, rotary_dim=6, init="identity").weight
    assert torch.equal(weight[..., 0], expected.expand(3, 2, 4))
    assert not weight[..., 1].any()


def test_more_components_start_as_means_of_blocks():
    assert torch.equal(HeadMixing(4, 2, "identity").weight, torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]))


def test_the_cache_of_interleaved_heads_holds_the_heads_before_they_are_combined():
    module, cache = InterleavedHeadAttention(48, 4, 2, num_pseudo_heads=3), KVCache()
    module(torch.randn(2, 5, 48), cache=cache)
    assert [x.shape for x in cache.layers[0]] == [(2, 2, 5, 12)] * 2


def test_noise_is_small_and_everywhere():
    off = HeadMixing(64, 64, "identity_noise").weight - torch.eye(64)
    assert (off != 0).all()
    # The standard deviation of n normal numbers is itself off by 1/sqrt(2 n); four of those is one test in 16,000.
    assert abs(off.std().item() / NOISE - 1) < 4 * (2 * 64**2) ** -0.5


@pytest.mark.parametrize("shape", [(4, 4), (2, 5)])
def test_orthogonal_components_do_not_overlap(shape, agree):
    weight = HeadMixing(*shape, "orthogonal").weight
    agree(weight @ weight.mT, torch.eye(shape[0]), terms=8 * shape[1])
    unitary = torch.view_as_complex(FrequencyMixing(*shape, head_dim=10, rotary_dim=10, init="orthogonal").weight)
    gram = torch.view_as_real(unitary @ unitary.mH)
    agree(gram[..., 0], torch.eye(shape[0]).expand(5, -1, -1), terms=16 * shape[1])
    agree(gram[..., 1], torch.zeros(5, shape[0], shape[0]), terms=16 * shape[1])


def test_scaled_random_keeps_the_variance_of_a_head():
    x = torch.randn(1, 400, 64, 16)
    for mixing in (HeadMixing(64, 64, "scaled_random"), FrequencyMixing(64, 64, 16, 16, "scaled_random")):
        # 64 × 64 weights: the mean of their squares is off by sqrt(2)/64; five of those, and the activations' share.
        assert abs(mixing(x).var().item() - 1) < 5 * 2**0.5 / 64


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, (4 * 12, 4 * 12)),
        ({"num_component_heads": 2}, (2 * 12, 2 * 12)),
        ({"num_component_heads": 2, "mix": "keys"}, (2 * 12, 4 * 12)),
        ({"num_component_heads": 1, "mix": "values"}, (4 * 12, 12)),
        ({"num_component_heads": 3, "key_mixing": "frequency"}, (3 * 12, 3 * 12)),
        ({"share_components": True}, (2 * 12, 2 * 12)),
        ({"share_components": True, "num_component_heads": 3}, (18, 18)),
    ],
)
def test_the_cache_holds_components_only(options, ranks):
    module, cache = MultiheadExplicitAttention(48, 4, 4, **options), KVCache()
    module(torch.randn(2, 5, 48), cache=cache)
    module(torch.randn(2, 1, 48), cache=cache)
    assert tuple(x[0, :, 0].numel() for x in cache.layers[0]) == ranks


@pytest.mark.parametrize("fold", ["always", "never"])
def test_auto_folds_when_that_is_cheaper(fold, monkeypatch):
    calls = []
    monkeypatch.setattr(HeadMixing, "fold", lambda self, w: calls.append("always") or w)
    monkeypatch.setattr(HeadMixing, "forward", lambda self, x: calls.append("never") or x)
    module = MultiheadExplicitAttention(48, 4, 4)
    module(torch.randn(1, 49 if fold == "always" else 47, 48))  # square: the turning point is at D tokens
    assert calls == [fold, fold]


@pytest.mark.parametrize("mix", ["both", "keys", "values", "neither"])
@pytest.mark.parametrize("gain", ["off", "no_gain", "shared_gain", "per_head_gain"])
def test_folded_keeps_every_option(mix, gain, agree):
    options = {"qk_norm": True, "bias": True, "window": 5, "causal": True, "layer_index": 3, "rope": None, "eps": 1e-3}
    module = MultiheadExplicitAttention(48, 4, 2, mix=mix, head_norm=gain, init="scaled_random", **options).double()
    plain = module.folded()
    assert type(plain) is GroupedQueryAttention
    assert (plain.window, plain.layer_index, plain.rope, plain.eps) == (5, 3, None, 1e-3)
    x = torch.randn(2, 11, 48, dtype=torch.float64)
    agree(plain(x), module(x), terms=4 * 48 + 22 + 2)


@pytest.mark.parametrize("on", ["qkv", "v", "kq"])
def test_knocking_heads_fold_with_every_option(on, agree):
    options = {"qk_norm": True, "bias": True, "window": 5, "layer_index": 3, "eps": 1e-3}
    module = KnockingHeadsAttention(48, 4, 2, on=on, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain = module.folded()
    assert (type(plain), plain.window, plain.layer_index, plain.eps) == (GroupedQueryAttention, 5, 3, 1e-3)
    x = torch.randn(2, 11, 48, dtype=torch.float64)
    agree(plain(x), module(x), terms=4 * 48 + 3 * 12 + 22 + 2)


@pytest.mark.parametrize("components", [2, 1])
@pytest.mark.parametrize("key_mixing", ["scalar", "frequency"])
def test_shared_components_fold_into_a_larger_cache_if_that_is_allowed(components, key_mixing, agree):
    options = {"num_component_heads": components, "key_mixing": key_mixing, "bias": True, "init": "scaled_random"}
    module = MultiheadExplicitAttention(48, 4, 2, share_components=True, **options).double()
    plain = module.folded(expand=True)
    x = torch.randn(2, 11, 48, dtype=torch.float64)
    agree(plain(x), module(x), terms=4 * 48 + 22 + 2)


def test_lambda_init_grows_with_depth():
    first, last = DifferentialAttention(48, 4, layer_index=0), DifferentialAttention(48, 4, layer_index=30)
    assert first.lambda_init == pytest.approx(0.2)
    assert last.lambda_init == pytest.approx(0.8, abs=1e-3)


def test_the_graph_of_names_is_complete():
    assert by_name("mea") is MultiheadExplicitAttention
    assert len(set(METHODS.values())) == len(METHODS) == 9
    with pytest.raises(ValueError, match=r"no attention method is called 'differntial_v1'.*mean 'differential_v1'"):
        by_name("differntial_v1")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GroupedQueryAttention(48, 4, 3), r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        (lambda: GroupedQueryAttention(50, 4), "give head_dim"),
        (lambda: GroupedQueryAttention(48, 4, window=0), "at least 1, not 0"),
        (lambda: MultiheadExplicitAttention(48, 4, 2, num_component_heads=3), "between 1 and num_kv_heads"),
        (lambda: MultiheadExplicitAttention(48, 4, 2, num_component_heads=1, mix="neither"), "need a mixing"),
        (lambda: MultiheadExplicitAttention(48, 4, 2, num_component_heads=1).folded(), "only a square mixing folds"),
        (lambda: MultiheadExplicitAttention(48, 4, 2, share_components=True, mix="keys"), "both of them mixed.*'keys'"),
        (
            lambda: MultiheadExplicitAttention(48, 4, 2, share_components=True).folded(),
            "2 shared component heads",
        ),
        (lambda: DifferentialAttention(48, 4, 1), "must be even"),
        (lambda: KnockingHeadsAttention(48, 4, on="vo"), "letters of 'qkv', each at most once, not 'vo'"),
        (lambda: KnockingHeadsAttention(48, 4, on="vv"), "not 'vv'"),
        (lambda: KnockingHeadsAttention(48, 4, on=""), "not ''"),
        (lambda: InterleavedHeadAttention(48, 4, num_pseudo_heads=0), "at least 1, not 0"),
        (lambda: InterleavedHeadAttention(48, 4, backend="flex"), "one of 'eager', 'sdpa', not 'flex'"),
        (lambda: TalkingHeadsAttention(48, 4, backend="sdpa"), "one of 'eager', not 'sdpa'"),
    ],
)
def test_impossible_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("option", ["mix", "head_norm", "init", "key_mixing", "fold", "backend"])
def test_unknown_names_are_refused(option):
    # With the shape checks on, the annotation refuses it first, and with a TypeError.
    with pytest.raises((ValueError, TypeError), match="nonsense"):
        MultiheadExplicitAttention(48, 4, 2, **{option: "nonsense"})


def test_the_wrong_kind_of_mask_is_refused():
    module = GroupedQueryAttention(48, 4, backend="flex")
    with pytest.raises(TypeError, match=r"needs a BlockMask .* not Tensor"):
        module(torch.randn(1, 3, 48), mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_modified_talking_heads_has_no_norm():
    module = ModifiedTalkingHeadsAttention(48, 4, 2)
    assert isinstance(module.head_norm, torch.nn.Identity)
    assert module.key_mixing.weight.shape == module.value_mixing.weight.shape == (2, 2)


def test_products_of_short_rows_are_attention():
    """Used for training in bfloat16 on a processor; exact in fp64, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 19, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, width in ((6, 8), (3, 8), (3, 5))
    )
    found = _short_rows(q, k, v, 0.3)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    scores = (0.3 * q @ repeated[0].mT).masked_fill(torch.ones(19, 19).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1) @ repeated[1]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for own, other in zip(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(own, other)
