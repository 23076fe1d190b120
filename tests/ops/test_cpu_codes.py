"""The kernels that read a cache of codes in groups, against the definition in fp64, at awkward sizes."""

import pytest
import torch

from mea.ops import cpu

needs_kernel = pytest.mark.skipif(cpu.library() is None, reason="no AVX-512 bf16 or no compiler: there is no kernel")

# Bits and size of each group, how many of the groups are pairs.
ALL_TIERS = ([(8, 16), (4, 96), (2, 64), (4, 48), (2, 96)], 3)
TWO_BITS = ([(2, 16), (2, 128)], 1)
EMPTY = ([(8, 0), (4, 32), (2, 0), (8, 48), (4, 0), (2, 16)], 3)
FOUR_FIRST = ([(4, 80), (8, 128), (4, 16)], 2)

# Sequences, queries, kv heads, frequencies, tokens, those before them, groups, whether each sequence has its angles
CASES = [
    (1, 3, 1, 5, 1, 0, ALL_TIERS, True),
    (2, 9, 3, 32, 63, 4, ALL_TIERS, True),
    (2, 9, 3, 32, 64, 0, TWO_BITS, False),
    (1, 9, 3, 7, 65, 4, EMPTY, True),
    (2, 3, 3, 33, 111, 4, FOUR_FIRST, True),
    (1, 9, 3, 32, 4097, 4, ALL_TIERS, True),
    (2, 7, 1, 16, 4097, 0, TWO_BITS, True),
    (1, 32, 8, 64, 300, 4, ALL_TIERS, False),
]


def made(b, h, g, f, n, begin, table, own, factor=1.0):
    """What both kernels read, in larger buffers with other things around; steps of a token's groups are alike."""
    generator = torch.Generator().manual_seed(n)
    (groups, paired), random = table, lambda *shape: torch.rand(*shape, generator=generator)
    size, width = sum(bits * size // 8 for bits, size in groups), sum(size for _, size in groups)
    pairs = sum(size for _, size in groups[:paired])
    codes = torch.randint(0, 256, (b, begin + n + 5, size + 3), dtype=torch.uint8, generator=generator)[..., :size]
    step = (0.5 + random(b, n, len(groups))) * factor * 0.1
    low = -step * torch.tensor([2.0**bits - 1 for bits, _ in groups]) * random(b, n, len(groups))
    scales = torch.full((b, begin + n + 5, 2 * len(groups)), float("nan")).bfloat16()
    scales[:, begin : begin + n] = torch.stack([low, step], -1).flatten(-2)
    turn = 10000.0 ** -(torch.arange(f).double() / f)
    starts = 64 * torch.arange(-(-n // 64) + 1) + 1000 * torch.arange(b if own else 1)[:, None]
    base, offsets = (x[..., None] * turn for x in (starts, torch.arange(64)))
    cache = {
        "codes": codes,
        "scales": scales,
        "groups": groups,
        "base": ((1.2 * base.cos()).float(), (1.2 * base.sin()).float()),
        "offsets": (offsets.cos().float(), offsets.sin().float()),
        "begin": begin,
        "n": n,
    }
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    frequency = torch.randint(0, f, (pairs // 2,), dtype=torch.int32, generator=generator)
    decoder = (normal(g, 2 * f, width) / width**0.5).bfloat16()
    of_pairs = {"queries": normal(b, h, pairs + 2 * f).bfloat16(), "frequency": frequency}
    of_joint = {"queries": normal(b, h, 2 * f).bfloat16(), "decoder": decoder, "mean": factor * normal(g, 2 * f)}
    return cache, of_pairs, of_joint


def decoded(cache):
    """The components and how large the two terms of each are: ``[b, n, r]``."""
    columns, sizes, place = [], [], 0
    scales = cache["scales"][:, cache["begin"] :][:, : cache["n"]].double()
    for i, (bits, size) in enumerate(cache["groups"]):
        packed = cache["codes"][:, cache["begin"] :][:, : cache["n"], place : place + bits * size // 8].int()
        code = torch.stack([packed >> k & 2**bits - 1 for k in range(0, 8, bits)], -1).flatten(-2)
        low, step = scales[..., 2 * i, None], scales[..., 2 * i + 1, None]
        columns.append(low + step * code)
        sizes.append(low.abs() + step.abs() * (2**bits - 1) + 0 * code)
        place += bits * size // 8
    return torch.cat(columns, -1), torch.cat(sizes, -1)


def turning(cache):
    """Cosine and sine of each token: ``[b or 1, n, f]``."""
    token = torch.arange(cache["n"])
    cos, sin = (x.double()[:, token // 64] for x in cache["base"])
    c, s = (x.double()[token % 64] for x in cache["offsets"])
    return cos * c - sin * s, sin * c + cos * s


def read(scores, values, hidden):
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None].bool(), float("-inf"))
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def pair_scores(cache, queries, frequency):
    """Products ``[b, h, n]`` in fp64, and the sums of their terms' sizes."""
    y, (cos, sin), pairs = decoded(cache)[0], turning(cache), 2 * len(frequency)
    re, im, c, s = y[..., 0:pairs:2], y[..., 1:pairs:2], cos[..., frequency.long()], sin[..., frequency.long()]
    rows = (re * c - im * s, re * s + im * c)
    rows = [*rows, *(x.expand(len(y), -1, -1) for x in (cos, sin))]
    tile = torch.cat([torch.stack(rows[i : i + 2], -1).flatten(-2) for i in (0, 2)], -1)
    return queries.double() @ tile.mT, tile


def joint_keys(cache, decoder, mean, latents):
    """Turned keys ``[b, g, n, d]``."""
    keys = torch.einsum("gdr,bnr->bgnd", decoder, latents) + mean[:, None]
    (a, b), (c, s) = keys.chunk(2, -1), (x[:, None] for x in turning(cache))
    return torch.cat([a * c - b * s, a * s + b * c], -1)


def joint_scores(queries, keys):
    return (queries.unflatten(1, (keys.shape[1], -1)) @ keys.mT).flatten(1, 2)


def average_bound(cache, score_error):
    """How far an average may be off.

    Weights times steps are multiples of 1/16256 of their largest in a block, so that half of that, for each of 64
    tokens, is at most 2^-9 of the block's weight, as with bf16 weights; scores that are off by so much move the weights
    by twice as much; sums of fp32 numbers and the polynomial of e^x are far below.
    """
    largest = decoded(cache)[1].amax((1, 2), keepdim=True)
    return (2**-9 + 2 * score_error.amax((1, 2), keepdim=True).expm1() + 1e-5) * largest


def pair_error(cache, queries, frequency):
    """Scores are fp32 throughout: a rounding for each term, and about four of the angles and of low + step * code."""
    pairs, f = 2 * len(frequency), cache["offsets"][0].shape[-1]
    sizes = 1.2 * decoded(cache)[1][..., :pairs].unflatten(-1, (-1, 2)).sum(-1).repeat_interleave(2, -1)
    sizes = torch.cat([sizes, sizes.new_full((*sizes.shape[:2], 2 * f), 2.4)], -1)
    return (pairs + 2 * f + 8) * 2**-23 * queries.double().abs() @ sizes.mT


def joint_error(cache, queries, decoder, mean):
    """A decoder's number is off by half a step of its row and group, 1/127 of the largest or 1/16256; the middle of the
    codes is kept exact, so that a code counts by its distance from there. The angles mix the channels of a pair."""
    d, r = decoder.shape[1:]
    scales, first, error = cache["scales"][:, cache["begin"] :][:, : cache["n"]].double(), 0, 0
    for i, (bits, size) in enumerate(cache["groups"]):
        if size:
            parts = decoder[..., first : first + size].double().abs().amax(-1) / (127 if bits <= 4 else 16256)
            step = scales[:, None, :, 2 * i + 1, None].abs()
            error = error + step * (2**bits - 1) / 2 * size * parts[:, None] / 2  # [b, g, n, d]
        first += size
    rounded = (
        (r + 16)
        * 2**-23
        * (torch.einsum("gdr,bnr->bgnd", decoder.double().abs(), decoded(cache)[1]) + mean.double().abs()[:, None])
    )
    both = (error + rounded).unflatten(-1, (2, d // 2)).sum(-2, keepdim=True).expand(-1, -1, -1, 2, -1).flatten(-2)
    return joint_scores(queries.double().abs(), 1.2 * both)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("some_hidden", "factor"), [(False, 1.0), (True, 1e-20), (True, 1e20)])
def test_pairs_are_turned_and_averaged_as_defined(case, some_hidden, factor):
    cache, own, _ = made(*case, factor=factor)
    hidden = (torch.arange(cache["n"]) % 3 == 1).to(torch.uint8).expand(case[0], -1) if some_hidden else None
    pairs, scale = 2 * len(own["frequency"]), 0.1 / max(factor, 1)
    average, lse = cpu.read_pairs(**own, **cache, hidden=hidden, scale=scale)
    exact, exact_lse = read(scale * pair_scores(cache, **own)[0], decoded(cache)[0], hidden)
    error = scale * pair_error(cache, **own)
    assert pairs == sum(size for _, size in case[6][0][: case[6][1]])
    assert average.dtype == lse.dtype == torch.float32
    assert ((average - exact).abs() <= average_bound(cache, error)).all()
    assert ((lse - exact_lse).abs() <= error.amax(-1) + 1e-6 * (1 + exact_lse.abs())).all()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("some_hidden", "factor"), [(False, 1.0), (True, 1e-20), (True, 1e20)])
def test_keys_are_rebuilt_turned_and_averaged_as_defined(case, some_hidden, factor):
    cache, _, own = made(*case, factor=factor)
    hidden = (torch.arange(cache["n"]) % 3 == 1).to(torch.uint8).expand(case[0], -1) if some_hidden else None
    scale, latents = 0.02 / factor, decoded(cache)[0]
    average, lse = cpu.read_joint(**own, **cache, hidden=hidden, scale=scale)
    keys = joint_keys(cache, own["decoder"].double(), own["mean"].double(), latents)
    exact, exact_lse = read(scale * joint_scores(own["queries"].double(), keys), latents, hidden)
    error = scale * joint_error(cache, **own)
    assert ((average - exact).abs() <= average_bound(cache, error)).all()
    assert ((lse - exact_lse).abs() <= error.amax(-1) + 1e-6 * (1 + exact_lse.abs())).all()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("kernel", ["pairs", "joint"])
def test_error_is_at_most_that_of_a_bf16_tile(kernel):
    cache, of_pairs, of_joint = made(1, 9, 3, 32, 1000, 4, ALL_TIERS, True)
    values, scale = decoded(cache)[0], 0.3
    tile = values.bfloat16()
    if kernel == "pairs":
        found = cpu.read_pairs(**of_pairs, **cache, hidden=None, scale=scale)
        scores, turned = pair_scores(cache, **of_pairs)
        rounded = of_pairs["queries"].double() @ turned.bfloat16().double().mT
    else:
        found = cpu.read_joint(**of_joint, **cache, hidden=None, scale=scale)
        queries, decoder, mean = (of_joint[name].double() for name in ("queries", "decoder", "mean"))
        scores = joint_scores(queries, joint_keys(cache, decoder, mean, values))
        rounded = joint_scores(queries, joint_keys(cache, decoder, mean, tile.double()).bfloat16().double())
    exact, stock = read(scale * scores, values, None), read(scale * rounded, tile.double(), None)
    for ours, theirs, right in zip(found, stock, exact, strict=True):
        assert (ours - right).square().mean() <= (theirs - right).square().mean()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 1000])
def test_the_number_of_threads_changes_nothing_but_rounding(tokens):
    cache, of_pairs, of_joint = made(2, 9, 3, 32, tokens, 4, ALL_TIERS, True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            pairs = cpu.read_pairs(**of_pairs, **cache, hidden=None, scale=0.1)
            found.append((*pairs, *cpu.read_joint(**of_joint, **cache, hidden=None, scale=0.1)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@needs_kernel
@torch.no_grad()
def test_large_scores_neither_overflow_nor_vanish():
    cache, own, _ = made(1, 3, 1, 16, 300, 4, ALL_TIERS, True)
    average, lse = cpu.read_pairs(**own, **cache, hidden=None, scale=1000.0)
    scores, values = 1000 * pair_scores(cache, **own)[0], decoded(cache)[0]
    assert torch.allclose(lse.double(), scores.amax(-1), rtol=1e-5)
    best = values[0, scores[0].argmax(-1)]
    assert ((average[0] - best).abs() <= 2**-9 * decoded(cache)[1].max()).all()


@needs_kernel
@torch.no_grad()
def test_with_all_tokens_hidden_there_is_nothing():
    cache, of_pairs, of_joint = made(2, 3, 3, 16, 200, 0, ALL_TIERS, True)
    hidden = torch.zeros(2, 200, dtype=torch.uint8)
    hidden[1] = 255
    for kernel, own in ((cpu.read_pairs, of_pairs), (cpu.read_joint, of_joint)):
        average, lse = kernel(**own, **cache, hidden=hidden, scale=0.1)
        assert not average[1].any()
        assert (lse[1] <= -1e29).all()
        visible = kernel(**own, **cache, hidden=None, scale=0.1)
        assert torch.equal(average[0], visible[0][0])
        assert torch.equal(lse[0], visible[1][0])


@needs_kernel
def test_what_the_kernels_take():
    queries, groups = torch.zeros(1, 9, 64).bfloat16(), ALL_TIERS[0]
    with torch.no_grad():
        assert cpu.codes_usable(queries, groups)
        assert not cpu.codes_usable(queries.float(), groups)
        assert not cpu.codes_usable(queries, [*groups, (4, 24)])
        assert not cpu.codes_usable(queries, [*groups, (3, 32)])
        assert not cpu.codes_usable(queries, [*groups, (4, 144)])
        assert not cpu.codes_usable(queries, [])
    assert not cpu.codes_usable(queries, groups)


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 300}, "not all in a cache"),
        ({"groups": [(8, 16), (4, 96), (2, 64), (4, 48), (2, 97)]}, "16, 32"),
        ({"groups": [(8, 16), (4, 96), (2, 64), (4, 48), (2, 112)]}, "do not hold"),
        ({"hidden": torch.zeros(1, 7, dtype=torch.uint8)}, "hidden is"),
        ({"frequency": torch.zeros(9, dtype=torch.int32)}, "pairs"),
        ({"queries": torch.zeros(1, 3, 20).bfloat16()}, "columns"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_what_does_not_fit_is_refused(change, message):
    cache, own, _ = made(1, 3, 1, 16, 200, 4, ALL_TIERS, True)
    with pytest.raises(ValueError, match=message):
        cpu.read_pairs(**{**own, **cache, "hidden": None, "scale": 0.1, **change})


@needs_kernel
@torch.no_grad()
def test_a_decoder_that_does_not_fit_is_refused():
    cache, _, own = made(1, 4, 2, 16, 200, 4, ALL_TIERS, True)
    with pytest.raises(ValueError, match="does not fit"):
        cpu.read_joint(**own, **{**cache, "groups": [(8, 16)]}, hidden=None, scale=0.1)
    with pytest.raises(ValueError, match="kv heads"):
        cpu.read_joint(**{**own, "queries": own["queries"][:, :3]}, **cache, hidden=None, scale=0.1)
