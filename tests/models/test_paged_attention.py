"""New tokens of requests of unequal lengths, read together from pages, against each request read by itself in fp64."""

import copy

import pytest
import torch
from torch import nn

from coded_models import FIRST, RECENT, coded
from mea.models.packed_cache import Held
from mea.models.paged_attention import PagedCodedAttention
from mea.ops import triton
from mea.ops.latent import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, EXACT_BLOCK = 64, 6
LENGTHS = [1, 3, FIRST + 1, FIRST + RECENT, FIRST + RECENT + 1, 64 + RECENT, 200]


class Paged(PagedCodedAttention, nn.Module):
    """A layer's attention over pages, without the projections."""

    def __init__(self, attention):
        nn.Module.__init__(self)
        self.config, self.rotary, self.code = attention.config, attention.rotary, attention.code
        self.head_dim, self.scaling, self.exact = attention.head_dim, attention.scaling, attention.exact

    def window(self):
        return None

    def _turned(self, queries, position_embeddings):
        return rotate(queries, *position_embeddings)


def in_pages(numbers, size, order, spare):
    """Requests' numbers ``[t, _]`` in pages, and the table of each; what belongs to nobody is NaN, or 255."""
    pages = torch.full(
        (len(order), size, numbers[0].shape[-1]), float("nan") if numbers[0].is_floating_point() else 255
    )
    pages, order, tables = pages.to(numbers[0].dtype), iter(order.tolist()), []
    for rows in numbers:
        tables.append([next(order) for _ in range(0, len(rows), size)])
        for page, part in zip(tables[-1], rows.split(size), strict=True):
            pages[page, : len(part)] = part
    longest = max(map(len, tables))
    return pages.to(DEVICE), torch.tensor([[*row, *[spare] * (longest - len(row))] for row in tables]).to(DEVICE)


def alone(attention, query, keys, values, codes, scales):
    """A request's last token read by itself: keys and values of its coded tokens are rebuilt."""
    total, none = keys.shape[2], keys.new_empty(1, 0, 0)
    first = torch.arange(min(FIRST, total), device=keys.device)[None]
    start, n = max(0, total - RECENT), max(0, total - RECENT)
    held = Held(
        keys[:, :, start:], values[:, :, start:], codes[:, :n] if n else none, scales[:, :n] if n else none, 0, total,
        keys[:, :, : first.shape[1]], values[:, :, : first.shape[1]], first,
    )  # fmt: skip
    turn = attention.rotary(keys, torch.arange(total, device=keys.device)[None])
    turned = rotate(query, *(x[:, -1:] for x in turn))
    return attention._read_many(turned, keys, values, held, None, turn, 0.0)[0, :, 0]


def rounding(attention, query, keys, values, components, unit):
    """Largest error of outputs: scores are sums of products, weights are off by as much, outputs are sums again."""
    code, count = attention.code, components.shape[-1]
    every = torch.cat([torch.zeros(1, count), torch.eye(count)]).to(components)
    shift, *columns = zip(*(x[0].transpose(0, 1) for x in code.rebuild(every[None])), strict=True)
    largest = []
    for mean, decoder, exact in zip(shift, zip(*columns, strict=True), (keys, values), strict=True):
        sizes = torch.stack([(column - mean).norm(dim=-1) for column in decoder])  # r g
        coded = mean.norm(dim=-1) + components.abs().double() @ sizes
        largest.append(torch.maximum(coded.max(), exact.norm(dim=-1).max()))
    terms = keys.shape[2] + count + attention.head_dim  # angles are off by as many units as there are tokens
    score = attention.scaling * query.norm(dim=-1).max() * largest[0]
    return terms * unit * (2 * score + 1) * largest[1]


@torch.no_grad()
@pytest.mark.parametrize("reading", ["predictive", "joint"])
@pytest.mark.parametrize("kernels", [False, True])
def test_requests_are_read_as_if_each_were_alone(monkeypatch, reading, kernels):
    if kernels:
        pytest.importorskip("triton", reason="the kernels need Triton: pip install 'mea[gpu]'")
    monkeypatch.setattr(triton, "usable", lambda *x: kernels)
    model = coded("llama", reading, max_position_embeddings=512).float().to(DEVICE)
    attention = Paged(model.model.layers[0].self_attn)
    config, d = model.config, attention.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    made = [torch.randn(2 * groups + heads, n, d, device=DEVICE).split([heads, groups, groups]) for n in LENGTHS]
    queries = torch.stack([query[:, -1] for query, _, _ in made])
    plain = [[x.transpose(0, 1).flatten(1) for x in pair] for _, *pair in made]
    # Codes of other numbers: a token that is read by its code instead of exactly shows.
    others = [torch.randn(2, 1, groups, n, d, device=DEVICE) for n in LENGTHS]
    packed = [[x[0] for x in attention.code.encode(*other)] for other in others]
    codes, exact = sum(-(-n // BLOCK) for n in LENGTHS), sum(-(-n // EXACT_BLOCK) for n in LENGTHS)
    orders = [torch.randperm(codes + 1), torch.randperm(exact + 1)]
    parts, tables = [], []
    for numbers, size, order in ((packed, BLOCK, orders[0]), (plain, EXACT_BLOCK, orders[1])):
        for part in zip(*numbers, strict=True):
            pages, table = in_pages(part, size, order, spare=int(order[-1]))
            parts.append(pages)
        tables.append(table)
    positions = torch.tensor(LENGTHS, device=DEVICE) - 1

    def together():
        rows = attention.rows(positions, max(LENGTHS), (tables[0], tables[1]), EXACT_BLOCK)
        return attention.read_rows(queries, tuple(parts), rows)

    found = together()
    attention.exact = (FIRST, RECENT - 1)
    wrong = together()
    exactly = copy.deepcopy(attention).double()
    exactly.exact = (FIRST, RECENT)
    unit = 2**-8 if kernels and DEVICE == "cuda" else 2**-24
    for number, (query, keys, values) in enumerate(made):
        wide = [x[None].double() for x in (query[:, -1:], keys, values)]
        expected = alone(exactly, *wide, *(x[None] for x in packed[number]))
        bound = rounding(exactly, *wide, exactly.code.decode(*packed[number]), unit)
        assert ((found[number] - expected).abs() <= bound).all()
        if LENGTHS[number] > FIRST + RECENT:
            assert ((wrong[number] - expected).abs() > bound).any()
