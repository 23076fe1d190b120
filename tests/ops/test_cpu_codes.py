"""The kernel that reads a packed cache, against the definition in fp64, at awkward sizes."""

import pytest
import torch

from mea.ops import cpu
from ops.random_codes import ALL_TIERS, EMPTY, TWO_BITS, random_codes

needs_kernel = pytest.mark.skipif(cpu.library() is None, reason="no AVX-512 bf16 or no compiler: there is no kernel")

FOUR_FIRST = ([(4, 80), (8, 128), (4, 16)], 2)

# Sequences, queries, kv heads, frequencies, coded tokens, those before them, groups, first and recent exact tokens,
# whether each sequence has its angles
CASES = [
    (1, 3, 1, 5, 1, 0, ALL_TIERS, 0, 1, True),
    (2, 9, 3, 32, 63, 4, ALL_TIERS, 4, 64, True),
    (2, 9, 3, 32, 64, 0, TWO_BITS, 0, 17, False),
    (1, 9, 3, 7, 65, 4, EMPTY, 4, 5, True),
    (2, 3, 3, 33, 111, 4, FOUR_FIRST, 1, 15, True),
    (1, 9, 3, 32, 4097, 4, ALL_TIERS, 4, 64, True),
    (2, 7, 1, 16, 4097, 0, TWO_BITS, 2, 3, True),
    (1, 32, 8, 64, 300, 4, ALL_TIERS, 4, 64, False),
]
READINGS = ["pairs", "joint"]


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def tiles(request):
    """Whether matrix tiles (AMX) are used; a processor without them is tested once."""
    kernel = cpu.library()
    if bool(kernel.mea_use_tiles(int(request.param))) != request.param:
        pytest.skip("no AMX here")
    yield request.param
    kernel.mea_use_tiles(1)


def made(reading, b, h, g, f, n, begin, table, first, recent, own, factor=1.0):
    """The maps of a layer and what is read, in larger buffers with other things around; steps of groups are alike.

    Outputs are the averages of `2 f` components for each kv head, and a mean: the decoder of values selects.
    """
    generator, d = torch.Generator().manual_seed(n), 2 * f
    groups, paired = table
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    width = sum(size for _, size in groups)
    pairs = sum(size for _, size in groups[:paired])
    codes, scales = random_codes(groups, b, begin, n, factor, generator)
    turn = 10000.0 ** -(torch.arange(f).double() / f)
    rows = 1000 * torch.arange(b if own else 1)[:, None]
    blocks, places = 64 * torch.arange(-(-n // 64) + 1) + rows, torch.arange(64)
    exact = torch.cat([torch.arange(first) + rows, begin + n + torch.arange(recent) + rows], 1)
    blocks, places, exact = (x[..., None] * turn for x in (blocks, places, exact))
    angles = cpu.Angles(
        ((1.2 * blocks.cos()).float(), (1.2 * blocks.sin()).float()),
        (places.cos().float(), places.sin().float()),
        ((1.2 * exact.cos()).float(), (1.2 * exact.sin()).float()),
    )
    buffers = [factor * normal(b, g, recent + 3, d).bfloat16() for _ in range(2)]
    firsts = [factor * normal(b, g, first, d).bfloat16() for _ in range(2)]
    call = {
        "queries": normal(b, h, d).bfloat16(),
        "recent": cpu.Exact(*(x[:, :, 3:] for x in buffers)),
        "first": cpu.Exact(*firsts) if first else None,
        "codes": codes,
        "scales": scales,
        "begin": begin,
        "n": n,
        "hidden": None,
        "angles": angles,
    }
    select = torch.zeros(g, d, width)
    select.view(g * d, width)[torch.arange(g * d), torch.randint(0, width, (g * d,), generator=generator)] = 1
    maps = {
        "groups": groups,
        "key_mean": factor * normal(g, d),
        "value_decoder": select.bfloat16(),
        "value_mean": factor * normal(g, d),
    }
    if reading == "pairs":
        maps["frequency"] = torch.randint(0, f, (pairs // 2,), dtype=torch.int32, generator=generator)
        maps["key_decoder"] = normal(g, pairs // 2, 2) / width**0.5
    else:
        maps["key_decoder"] = (normal(g, d, width) / width**0.5).bfloat16()
    return maps, call


def decoded(maps, call):
    """The components and how large the two terms of each are: ``[b, n, r]``."""
    columns, sizes, place = [], [], 0
    here = slice(call["begin"], call["begin"] + call["n"])
    scales = call["scales"][:, here].double()
    for i, (bits, size) in enumerate(maps["groups"]):
        packed = call["codes"][:, here, place : place + bits * size // 8].int()
        code = torch.stack([packed >> k & 2**bits - 1 for k in range(0, 8, bits)], -1).flatten(-2)
        low, step = scales[..., 2 * i, None], scales[..., 2 * i + 1, None]
        columns.append(low + step * code)
        sizes.append(low.abs() + step.abs() * (2**bits - 1) + 0 * code)
        place += bits * size // 8
    return torch.cat(columns, -1), torch.cat(sizes, -1)


def coded_angles(call):
    """Cosine and sine of each coded token: ``[b or 1, n, f]``."""
    token = torch.arange(call["n"])
    cos, sin = (x.double()[:, token // 64] for x in call["angles"].blocks)
    c, s = (x.double()[token % 64] for x in call["angles"].places)
    return cos * c - sin * s, sin * c + cos * s


def turned(heads, cos, sin):
    """Heads ``[b, g, t, d]`` with channels ``c`` and ``c + d / 2`` turned."""
    (x, y), c, s = heads.double().chunk(2, -1), cos.double()[:, None], sin.double()[:, None]
    return torch.cat([x * c - y * s, y * c + x * s], -1)


def coded_keys(maps, components):
    """Keys ``[b, g, n, d]`` before RoPE, rebuilt from components."""
    mean, decoder = maps["key_mean"].double(), maps["key_decoder"].double()
    if "frequency" not in maps:
        return torch.einsum("gdr,bnr->bgnd", decoder, components) + mean[:, None]
    half, keys = mean.shape[1] // 2, mean[:, None].repeat(len(components), 1, components.shape[1], 1)
    for p, frequency in enumerate(maps["frequency"].tolist()):
        re, im = components[:, None, :, 2 * p], components[:, None, :, 2 * p + 1]
        a, b = decoder[:, p, 0, None], decoder[:, p, 1, None]
        keys[..., frequency] += a * re - b * im
        keys[..., half + frequency] += a * im + b * re
    return keys


def oracle(maps, call, scale, components=None, keys=None):
    """Outputs ``[b, h, d]``, and scores ``[b, h, t]`` of the coded tokens and of the exact ones."""
    components = decoded(maps, call)[0] if components is None else components
    if keys is None:
        keys = turned(coded_keys(maps, components), *coded_angles(call))
    cos, sin = call["angles"].exact
    exact = [x if call["first"] is None else torch.cat([old, x], 2) for old, x in zip(
        call["first"] or call["recent"], call["recent"], strict=True)]  # fmt: skip
    rows = exact[0].shape[2]
    exact_keys, g = turned(exact[0], cos[:, :rows], sin[:, :rows]), exact[0].shape[1]
    queries = turned(call["queries"][:, :, None], cos[:, rows - 1 : rows], sin[:, rows - 1 : rows])
    queries = queries.squeeze(2).unflatten(1, (g, -1))
    scores, near = (scale * (queries @ k.mT).flatten(1, 2) for k in (keys, exact_keys))
    if call["hidden"] is not None:
        scores = scores.masked_fill(call["hidden"][:, None].bool(), float("-inf"))
    values = torch.einsum("gdr,bnr->bgnd", maps["value_decoder"].double(), components)
    values = torch.cat([values + maps["value_mean"].double()[:, None], exact[1].double()], 2)
    weights = torch.cat([scores, near], -1).softmax(-1)
    return (weights.unflatten(1, (g, -1)) @ values).flatten(1, 2), scores, near


def score_error(maps, call, scale, tiles):
    """How far scores of coded tokens may be off: ``[b, h, n]``.

    With pairs all is fp32: a rounding for each of a score's terms, and about sixteen of the angles, of
    ``low + step * code``, and of absorbing. Tiles round turned components and queries to bf16 besides, by at most 2^-9
    of them, and have the mean's part in two bf16 numbers each. When keys are rebuilt without tiles, a decoder's number
    is off by half a step of its row and group, 1/127 of the largest or 1/16256; the middle of the codes is kept exact,
    so that a code counts by its distance from there. Angles mix the channels of a pair.
    """
    queries, sizes = call["queries"].double().abs(), decoded(maps, call)[1]
    (g, d), r = maps["key_mean"].shape, sizes.shape[-1]
    rounding, bf16 = (r + d + 16) * 2**-23, (2**-8 + 2**-18) * tiles
    upper = {**maps, "key_mean": maps["key_mean"].abs(), "key_decoder": maps["key_decoder"].abs()}
    if "frequency" in maps:
        here = 2 * len(maps["frequency"])
        both = torch.stack([sizes[..., 0:here:2] + sizes[..., 1:here:2]] * 2, -1).flatten(-2)
        # |a re - b im| is at most |a| |re| + |b| |im|: two terms of the same sign
        upper["key_decoder"] = upper["key_decoder"].sum(-1, keepdim=True) * torch.tensor([0.5, 0.5])
        mean = upper["key_mean"].double()[:, None]
        keys = (coded_keys(upper, 2 * both) - mean) * (rounding + bf16) + 2 * mean * (rounding + 2**-16 * tiles)
    elif tiles:
        keys = (rounding + bf16) * coded_keys(upper, sizes)  # queries are fp32 here: more than there is
    else:
        keys, first = rounding * coded_keys(upper, sizes), 0
        scales = call["scales"][:, call["begin"] :][:, : call["n"]].double()
        for i, (bits, size) in enumerate(maps["groups"]):
            if size:
                parts = maps["key_decoder"][..., first : first + size].double().abs().amax(-1)
                step = scales[:, None, :, 2 * i + 1, None].abs()
                keys = keys + step * (2**bits - 1) / 2 * size * (parts / (127 if bits <= 4 else 16256))[:, None] / 2
            first += size
    halves = lambda x: x.unflatten(-1, (-1, d // 2)).sum(-2)  # noqa: E731
    queries = 1.2 * halves(queries.unflatten(1, (g, -1)))
    return scale * (queries @ (1.2 * halves(keys)).mT).flatten(1, 2)


def output_bound(maps, call, error):
    """How far an output may be off.

    Weights times steps are multiples of 1/16256 of their largest in a block, so that half of that, for each of 64
    tokens, is at most 2^-9 of the block's weight, as with bf16 weights; scores that are off by so much move the weights
    by twice as much; sums of fp32 numbers and the polynomial of e^x are far below.
    """
    largest = decoded(maps, call)[1].amax((1, 2), keepdim=True) + maps["value_mean"].abs().max()
    for exact in (call["recent"], call["first"]):
        if exact is not None:
            largest = torch.maximum(largest, exact.values.double().abs().amax((1, 2, 3))[:, None, None])
    return (2**-9 + 2 * (2 * error.amax((1, 2), keepdim=True)).expm1() + 1e-5) * largest


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("some_hidden", "factor"), [(False, 1.0), (True, 1e-20), (True, 1e20)])
def test_the_output_is_that_of_the_definition(tiles, reading, case, some_hidden, factor):
    maps, call = made(reading, *case, factor=factor)
    if some_hidden:
        call["hidden"] = (torch.arange(call["n"]) % 3 == 1).to(torch.uint8).repeat(case[0], 1)
    scale = 0.02 / factor
    output = cpu.PackedReader(**maps).read(**call, scale=scale)
    error = score_error(maps, call, scale, tiles)
    assert output.dtype == torch.float32
    assert ((output - oracle(maps, call, scale)[0]).abs() <= output_bound(maps, call, error)).all()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
def test_error_is_at_most_that_of_a_bf16_tile(tiles, reading):
    maps, call = made(reading, 1, 9, 3, 32, 1000, 4, ALL_TIERS, 4, 64, True)
    components, scale = decoded(maps, call)[0], 0.1
    found, exact = cpu.PackedReader(**maps).read(**call, scale=scale), oracle(maps, call, scale)[0]
    tile = components.bfloat16().double()
    keys = turned(coded_keys(maps, tile), *coded_angles(call)).bfloat16().double()
    stock = oracle(maps, call, scale, tile, keys)[0]
    assert (found - exact).square().mean() <= (stock - exact).square().mean()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 1000])
def test_the_number_of_threads_changes_nothing_but_rounding(tiles, tokens):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            both = [made(reading, 2, 9, 3, 32, tokens, 4, ALL_TIERS, 4, 64, True) for reading in READINGS]
            found.append([cpu.PackedReader(**maps).read(**call, scale=0.1) for maps, call in both])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@needs_kernel
@torch.no_grad()
def test_large_scores_neither_overflow_nor_vanish(tiles):
    maps, call = made("pairs", 1, 3, 1, 16, 300, 4, ALL_TIERS, 0, 1, True)
    output, scores, near = (*[cpu.PackedReader(**maps).read(**call, scale=1000.0)], *oracle(maps, call, 1000.0)[1:])
    values = decoded(maps, call)[0] @ maps["value_decoder"].double()[0].T + maps["value_mean"].double()
    values = torch.cat([values, call["recent"].values[:, 0].double()], 1)
    best = values[0, torch.cat([scores, near], -1)[0].argmax(-1)]
    assert ((output[0] - best).abs() <= 2**-9 * decoded(maps, call)[1].max()).all()


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
def test_with_all_coded_tokens_hidden_the_exact_ones_are_read(tiles, reading):
    maps, call = made(reading, 2, 3, 3, 16, 200, 0, ALL_TIERS, 4, 64, True)
    hidden = torch.zeros(2, 200, dtype=torch.uint8)
    hidden[1] = 255
    reader = cpu.PackedReader(**maps)
    output, visible = (reader.read(**{**call, "hidden": x}, scale=0.1) for x in (hidden, None))
    right = oracle(maps, {**call, "hidden": hidden}, 0.1)[0]
    torch.testing.assert_close(output[1].double(), right[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(output[0], visible[0])


@needs_kernel
@torch.no_grad()
def test_a_new_token_takes_the_place_of_the_oldest():
    buffer, token = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 1, 3, 8).bfloat16().transpose(1, 2)
    right = torch.cat([buffer[:, :, 1:], token], 2)
    other, right_other = buffer + 1, torch.cat([buffer[:, :, 1:] + 1, token], 2)
    cpu.push((buffer, other), (token, token))
    assert torch.equal(buffer, right)
    assert torch.equal(other, right_other)


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
        ({"hidden": torch.zeros(1, 7, dtype=torch.uint8)}, "hidden is"),
        ({"queries": torch.zeros(1, 3, 20).bfloat16()}, "do not fit"),
        ({"scales": torch.zeros(1, 209, 3).bfloat16()}, "do not hold"),
        ({"first": None, "angles": "short"}, "angles"),
        ({"codes": torch.zeros(1, 300, 209, dtype=torch.uint8).mT}, "must be contiguous"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_what_does_not_fit_is_refused(change, message):
    maps, call = made("pairs", 1, 3, 1, 16, 200, 4, ALL_TIERS, 4, 64, True)
    if "angles" in change:
        change = change | {"angles": call["angles"]._replace(exact=tuple(x[:, :9] for x in call["angles"].exact))}
    with pytest.raises(ValueError, match=message):
        cpu.PackedReader(**maps).read(**{**call, **change}, scale=0.1)


@needs_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [(8, 16), (4, 96), (2, 64), (4, 48), (2, 97)]}, "16, 32"),
        ({"groups": [(8, 16), (4, 96), (2, 64), (4, 48), (2, 112)]}, "do not fit"),
        ({"frequency": torch.zeros(9, dtype=torch.int32)}, "pairs"),
        ({"frequency": None}, "do not fit"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_maps_that_do_not_fit_are_refused(change, message):
    maps, _ = made("pairs", 1, 3, 1, 16, 200, 4, ALL_TIERS, 4, 64, True)
    with pytest.raises(ValueError, match=message):
        cpu.PackedReader(**{**maps, **change})
