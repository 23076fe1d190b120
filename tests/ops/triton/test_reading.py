"""The Triton kernels that read a packed cache, against the definition in fp64, at awkward sizes.

Without a GPU they run in Triton's interpreter, where products are of fp32 numbers instead of bf16 ones.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'mea[gpu]'")

from mea.ops.triton import Angles, CodedTokens, reference
from mea.ops.triton.packed import DOT, PackedReader
from ops.random_codes import ALL_TIERS, EMPTY, TWO_BITS, random_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READINGS = ["pairs", "joint"]

ODD = ([(8, 34), (8, 36), (4, 6), (2, 10), (8, 3), (4, 7), (2, 13)], 4)  # codes that end within a byte

# Sequences, queries, kv heads, new tokens, frequencies, coded tokens, those before them, groups, whether each sequence
# has its angles
CASES = [
    (1, 3, 1, 1, 5, 1, 0, ALL_TIERS, True),
    (2, 6, 2, 1, 32, 63, 4, ALL_TIERS, True),
    (1, 6, 2, 2, 32, 64, 0, TWO_BITS, False),
    (1, 2, 1, 1, 7, 65, 4, EMPTY, True),
    (1, 2, 2, 3, 33, 111, 4, ODD, True),
    (1, 34, 1, 1, 40, 65, 1, TWO_BITS, False),
    pytest.param((1, 9, 3, 1, 32, 4097, 4, ALL_TIERS, True), marks=pytest.mark.slow),
]


def made(reading, b, h, g, q, f, n, begin, table, own, factor=1.0):
    """The maps of a layer and what is read, in larger buffers with other things around."""
    generator, d = torch.Generator().manual_seed(n), 2 * f
    groups, paired = table
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    width = sum(size for _, size in groups)
    codes, scales = random_codes(groups, b, begin, n, factor, generator)
    turn = 10000.0 ** -(torch.arange(f).double() / f)
    blocks, places = (
        64 * torch.arange(-(-n // 64) + 1) + 1000 * torch.arange(b if own else 1)[:, None],
        torch.arange(64),
    )
    blocks, places = (x[..., None] * turn for x in (blocks, places))
    angles = [(1.2 * blocks.cos()).float(), (1.2 * blocks.sin()).float(), places.cos().float(), places.sin().float()]
    angles = [x.to(DEVICE) for x in angles]
    mean, frequency = factor * normal(g, d).to(DEVICE), None
    if reading == "pairs":
        pairs = sum(size for _, size in groups[:paired]) // 2
        frequency = torch.randint(0, f, (pairs,), dtype=torch.int32, generator=generator).to(DEVICE)
        decoder = normal(g, pairs, 2) / width**0.5
    else:
        decoder = normal(g, d, width) / width**0.5
    maps = reference.Maps(groups, decoder.bfloat16().to(DEVICE), mean, frequency)
    tokens = CodedTokens(codes.to(DEVICE), scales.to(DEVICE), begin, n)
    return maps, normal(b, h, q, d).to(DEVICE), tokens, Angles((angles[0], angles[1]), (angles[2], angles[3]))


def reader(maps):
    return PackedReader(maps.groups, maps.key_decoder, maps.key_mean, frequency=maps.frequency)


def check(maps, queries, tokens, angles, scale):
    """Compare with fp64: scores, of some hundred terms each, are off by rounding, and weights by as much."""
    found, log_sum = reader(maps).read(queries, tokens, angles, scale)
    expected, right = reference.read(maps, queries.double(), tokens, angles, scale)
    assert found.dtype == log_sum.dtype == torch.float32
    components = reference.decode(maps.groups, tokens).double()
    largest = components.nan_to_num().abs().amax()
    upper = reference.Maps(maps.groups, maps.key_decoder.abs(), maps.key_mean.abs(), maps.frequency)
    size = queries.double().norm(dim=-1).max() * (
        1.2 * upper.key_mean.double().norm(dim=-1).max()
        + 1.2 * largest * upper.key_decoder.double().square().sum().sqrt()
    )
    terms = 2 * (len(maps.groups) + 1) * 128
    rounding = terms * 2**-24 if torch.float32 == DOT else 2**-8
    score = float(scale * size * rounding)
    seen = right > float("-inf")
    assert ((log_sum > float("-inf")) == seen).all()
    assert ((log_sum - right)[seen].abs() <= score + 2**-20 * right[seen].abs()).all()
    bound = (2 * score + (2**-20 if torch.float32 == DOT else 2**-7)) * largest
    assert ((found - expected).abs() <= bound).all(), float((found - expected).abs().max() / bound)


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_contiguous_cache_is_read_as_defined(reading, case):
    check(*made(reading, *case), 0.02)


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_hidden_tokens_get_no_weight_at_any_scale(reading, factor):
    maps, queries, tokens, angles = made(reading, 2, 3, 1, 1, 32, 70, 4, ALL_TIERS, True, factor)
    hidden = (torch.arange(70) % 3 == 1).to(torch.uint8).repeat(2, 1)
    hidden[1, :64] = 255  # a whole block
    check(maps, queries, tokens._replace(hidden=hidden.to(DEVICE)), angles, 0.02 / factor)


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
def test_new_tokens_read_as_many_as_each_may(reading):
    maps, queries, tokens, angles = made(reading, 2, 2, 1, 4, 16, 130, 0, ALL_TIERS, True)
    seen = torch.tensor([[127, 128, 129, 130], [0, 1, 64, 65]], device=DEVICE)
    check(maps, queries, tokens._replace(seen=seen), angles, 0.1)


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("page", [64, 128])
def test_pages_are_read_in_the_order_of_their_table(reading, page):
    """Sequences of unequal lengths; pages that belong to nobody hold NaN, and the shorter table ends in nonsense."""
    maps, queries, tokens, angles = made(reading, 2, 3, 1, 1, 16, 130, 0, EMPTY, True)
    seen = torch.tensor([[130], [50]], device=DEVICE)
    count = -(-130 // page)
    order = torch.randperm(3 * count)[: 2 * count].view(2, count)
    codes = torch.zeros(3 * count, page, tokens.codes.shape[-1], dtype=torch.uint8)
    scales = torch.full((3 * count, page, tokens.scales.shape[-1]), float("nan")).bfloat16()
    for sequence, length in enumerate((130, 50)):
        for slot in range(length):
            at = order[sequence, slot // page], slot % page
            codes[at], scales[at] = tokens.codes[sequence, slot].cpu(), tokens.scales[sequence, slot].cpu()
    pages = order.clone().int()
    pages[1, -(-50 // page) :] = -1
    held = CodedTokens(codes.to(DEVICE), scales.to(DEVICE), 0, 130, None, seen, pages.to(DEVICE))
    found = reader(maps).read(queries, held, angles, 0.1)
    contiguous = reader(maps).read(queries, tokens._replace(seen=seen), angles, 0.1)
    assert all(torch.equal(*pair) for pair in zip(found, contiguous, strict=True))
    check(maps, queries, held, angles, 0.1)


@torch.no_grad()
def test_log_sums_merge_two_parts_of_a_cache():
    maps, queries, tokens, angles = made("pairs", 1, 3, 1, 1, 32, 192, 0, ALL_TIERS, True)
    whole, _ = reader(maps).read(queries, tokens, angles, 0.1)
    old, a = reader(maps).read(queries, tokens._replace(n=128), angles, 0.1)
    later = Angles((angles.blocks[0][:, 2:], angles.blocks[1][:, 2:]), angles.places)
    new, b = reader(maps).read(queries, tokens._replace(begin=128, n=64), later, 0.1)
    torch.testing.assert_close(torch.lerp(new, old, torch.sigmoid(a - b)[..., None]), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 300}, "not all in a cache"),
        ({"scales": torch.zeros(1, 209, 3).bfloat16()}, "are not"),
        ({"codes": torch.zeros(1, 209, 300, dtype=torch.uint8).mT}, "must be contiguous"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_what_does_not_fit_is_refused(change, message):
    maps, queries, tokens, angles = made("pairs", 1, 3, 1, 1, 16, 200, 4, ALL_TIERS, True)
    with pytest.raises(ValueError, match=message):
        reader(maps).read(queries, tokens._replace(**change), angles, 0.1)


@pytest.mark.parametrize("groups", [[(4, 144)], [(8, 3), (8, 5)], []])
def test_groups_that_do_not_fit_are_refused(groups):
    with pytest.raises(ValueError, match="128 components"):
        PackedReader(groups, torch.zeros(1, 4, 2), torch.zeros(1, 8), frequency=torch.zeros(4))
