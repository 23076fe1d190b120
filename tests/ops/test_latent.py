"""Reading a compressed cache: absorbed, materialised, in parts, and the definition are one thing."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mea.ops import latent
from mea.ops.latent import (
    absorb,
    absorbed_is_cheaper,
    attend_rebuilt,
    encode,
    key_positions,
    materialise,
    parts_to_read,
    read_in_parts,
    rebuilt_scores,
    unmix,
)

# b, query heads, kv heads, query tokens, cached tokens, head dimension, key width, value width
SIZES = {
    "multi-head": (2, 3, 3, 1, 63, 10, 20, 20),
    "grouped": (1, 12, 3, 1, 111, 6, 7, 11),
    "one kv head": (2, 5, 1, 1, 17, 12, 5, 5),
    "several queries": (2, 6, 2, 7, 40, 8, 9, 9),
}


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def sizes(request):
    return request.param


def inputs(sizes):
    b, h, g, q, t, d, rk, rv = sizes
    shapes = [(b, h, q, d), (b, 1, t, rk), (b, 1, t, rv), (g, d, rk), (g, d, rv)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def by_definition(queries, keys, values, key_decoder, value_decoder):
    """Head by head and query by query, with rebuilt keys and values."""
    output = torch.empty_like(queries)
    group = queries.shape[1] // len(key_decoder)
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in queries.shape[:3])).tolist():
        k, v = keys[b, 0] @ key_decoder[h // group].T, values[b, 0] @ value_decoder[h // group].T
        scores = k @ queries[b, h, q] / queries.shape[-1] ** 0.5
        output[b, h, q] = torch.softmax(scores, 0) @ v
    return output


def test_absorbed_and_materialised_are_the_definition(sizes, agree):
    b, h, _, q, t, d, rk, rv = sizes
    queries, keys, values, key_decoder, value_decoder = inputs(sizes)
    expected = by_definition(queries, keys, values, key_decoder, value_decoder)
    packed = absorb(queries, key_decoder).reshape(b, 1, h * q, rk)
    outputs = scaled_dot_product_attention(packed, keys, values, scale=d**-0.5).view(b, h, q, rv)
    rebuilt = [materialise(keys, key_decoder), materialise(values, value_decoder)]
    terms = rk + d + t + rv
    agree(unmix(outputs, value_decoder), expected, terms, "absorbed")
    agree(scaled_dot_product_attention(queries, *rebuilt, enable_gqa=True), expected, terms, "materialised")


def test_gradients_of_both_readings_agree(sizes, agree):
    b, h, _, q, t, d, rk, rv = sizes
    tensors = [tensor.requires_grad_() for tensor in inputs(sizes)]
    queries, keys, values, key_decoder, value_decoder = tensors
    latent = scaled_dot_product_attention(absorb(queries, key_decoder), keys, values, scale=d**-0.5, enable_gqa=True)
    absorbed = unmix(latent, value_decoder)
    rebuilt = [materialise(keys, key_decoder), materialise(values, value_decoder)]
    materialised = scaled_dot_product_attention(queries, *rebuilt, enable_gqa=True)
    direction = torch.randn_like(absorbed)
    grads = [torch.autograd.grad(output, tensors, direction) for output in (absorbed, materialised)]
    for name, one, other in zip(("queries", "keys", "values", "key_decoder", "value_decoder"), *grads, strict=True):
        agree(one, other, b * h * q * t + rk + rv + d, name)


@pytest.mark.parametrize(("g", "d"), [(3, 8), (4, 5), (1, 12)])
def test_orthogonal_factors_of_full_rank_lose_nothing(g, d, agree):
    heads, width = torch.randn(2, g, 9, d, dtype=torch.float64), g * d
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    latents = encode(heads, basis)
    assert latents.shape == (2, 1, 9, width)
    assert latents.is_contiguous()
    agree(materialise(latents, basis.T.reshape(g, d, width)), heads, 2 * width)


@pytest.mark.parametrize("t", [512, 1000, 1023])
@pytest.mark.parametrize("parts", [2, 3])
def test_reading_in_parts_is_reading_at_once(parts, t, agree):
    """Also where a part is left over, and where one part holds nearly all the weight."""
    b, n, r = 2, 9, 24
    queries, keys, values = (torch.randn(b, 1, m, r, dtype=torch.float64) for m in (n, t, t))
    keys[:, :, 3] += 9 * queries.mean(2)
    expected = scaled_dot_product_attention(queries, keys, values, scale=0.3)
    agree(read_in_parts(queries, keys, values, 0.3, parts), expected, r + t)


def test_reading_in_parts_takes_a_view_of_a_larger_buffer(agree):
    buffer = torch.randn(1, 1, 900, 16, dtype=torch.float64)
    view, queries = buffer[:, :, :601], torch.randn(1, 1, 4, 16, dtype=torch.float64)
    agree(read_in_parts(queries, view, view, 0.25, 2), read_in_parts(queries, view.clone(), view.clone(), 0.25, 2), 617)


def test_parts_are_for_idle_cores_only(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    latents = torch.empty(1, 1, 5000, 4)
    with torch.no_grad():
        assert parts_to_read(latents, 4) == 8
        assert parts_to_read(latents.expand(4, -1, -1, -1), 4) == 2
        assert parts_to_read(latents.expand(16, -1, -1, -1), 4) == 1
        assert parts_to_read(latents[:, :, :600], 4) == 1
        assert parts_to_read(latents, 5) == 1, "the kernel needs equal ranks"
    assert parts_to_read(latents, 4) == 1, "the sums of the parts have no gradient"


@pytest.mark.parametrize("h", [4, 12])
@pytest.mark.parametrize("r", [8, 24])
@pytest.mark.parametrize("q", [1, 2, 5, 40, 400])
def test_the_cheaper_reading_is_the_one_with_fewer_multiplications(q, r, h):
    t, g, d = 500, 2, 12
    counts = {
        # absorb, scores over latents; rebuild keys, scores over keys; values cost the same again
        "absorbed": h * q * d * r + h * q * t * r + h * q * t * r + h * q * r * d,
        "materialised": t * r * g * d + h * q * t * d + h * q * t * d + t * r * g * d,
    }
    expected = q == 1 or counts["absorbed"] < counts["materialised"]
    assert absorbed_is_cheaper(q, t, h, torch.Size((g, d, r))) == expected


@pytest.mark.parametrize("mask", [None, "boolean", "added"])
@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize("block", [3, 2048])
def test_rebuilt_keys_over_latent_values_are_the_definition(sizes, mask, cut, block, monkeypatch):
    """Latents whole or in two parts, keys at once or in blocks, of which the last is smaller."""
    monkeypatch.setattr(latent, "REBUILT", block)
    queries, keys, values, key_decoder, value_decoder = inputs(sizes)
    (b, h, q, d), t = queries.shape, keys.shape[2]
    angles = 7 * torch.rand(1, t, d // 2).double().repeat(1, 1, 2)
    rebuilt, expanded = materialise(keys, key_decoder), materialise(values, value_decoder)
    turned = torch.view_as_complex(torch.stack(rebuilt.chunk(2, -1), -1)) * torch.exp(1j * angles[..., : d // 2])
    seen = torch.rand(b, 1, q, t) < 0.7
    seen[..., -1] = True
    given = {None: None, "boolean": seen, "added": torch.zeros(seen.shape).double().masked_fill(~seen, -torch.inf)}[
        mask
    ]
    parts = [x.tensor_split([cut] if cut else [], -1) for x in (keys, values)]
    scores = rebuilt_scores(queries, parts[0], key_decoder, angles.cos(), angles.sin())
    output, weights = attend_rebuilt(scores, parts[1], given, 0.3)
    every = (
        x.repeat_interleave(h // len(key_decoder), 1) for x in (torch.cat([turned.real, turned.imag], -1), expanded)
    )
    expected = scaled_dot_product_attention(queries, *every, attn_mask=given, scale=0.3)
    # The weights are rounded to 32 bits.
    torch.testing.assert_close(unmix(output, value_decoder), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    torch.testing.assert_close(weights.sum(-1), torch.ones(b, h, q).double(), rtol=0, atol=1e-6)


def row(text):
    """One slot a character: ``.`` padding, ``x`` a token."""
    return torch.tensor([[character == "x" for character in text]])


@pytest.mark.parametrize("text", ["xxxxxxxx", "...xxxxx", "xxx..xxx", "..xx.xx.xx"])
@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("empty", [0, 3])
@pytest.mark.parametrize("between", [False, True])
def test_positions_are_those_that_the_tokens_had(text, new, lost, empty, between):
    """Numbered between padding as `generate` does, or by slots; the window has lost slots, or has empty ones behind."""
    seen = row(text)
    true = seen.long().cumsum(-1) - 1 if between else torch.arange(len(text))[None]
    past = len(text) - new
    hidden = torch.cat([~seen[:, lost:], torch.ones(1, empty, dtype=torch.bool)], 1)
    hidden[:, past - lost + 1 :] = True  # from the first new token
    if empty and lost:  # a cache that has lost slots has no empty ones
        return
    found = key_positions(true[:, past:], hidden, past, hidden.shape[1])
    kept = seen[:, lost:]
    assert torch.equal(found[:, : kept.shape[1]][kept], true[:, lost:][kept])
    if "." not in text:  # then no mask need be given, and the length may be a tensor
        for length in (past, torch.tensor(past)):
            assert torch.equal(
                key_positions(true[:, past:], None, length, hidden.shape[1])[0, : kept.shape[1]], true[0, lost:]
            )
