"""The kernel for processors against the definition, at awkward sizes, and what happens where it cannot be had."""

import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mea.ops import cpu, triton
from mea.ops.codes import pack
from mea.ops.latent import materialise, read, rebuilt_scores, rotate

# b, g, queries per head, tokens, key width, value width
SIZES = [
    (1, 1, 4, 1000, 256, 256),
    (2, 3, 5, 777, 60, 100),
    (1, 1, 9, 4099, 96, 96),
    (4, 1, 1, 63, 10, 7),
    (1, 4, 8, 1, 33, 130),
]

# The only tests that ask for the processor: elsewhere there is nothing to run, and `read` is tested without the kernel.
needs_kernel = pytest.mark.skipif(cpu.library() is None, reason="no AVX-512 bf16 or no compiler: there is no kernel")


@pytest.fixture
def fresh(monkeypatch):
    """`library` looks again, before the test and after it."""
    cpu.library.cache_clear()
    yield monkeypatch
    cpu.library.cache_clear()


def inputs(b, g, n, t, rk, rv):
    generator = torch.Generator().manual_seed(t)
    queries, keys, values = (
        torch.randn(b, g, rows, width, generator=generator).bfloat16() for rows, width in ((n, rk), (t, rk), (t, rv))
    )
    return queries, keys, values


@needs_kernel
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(sizes, threads):
    queries, keys, values = inputs(*sizes)
    scale, before = sizes[4] ** -0.5, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = cpu.attend(queries, keys, values, scale)
    finally:
        torch.set_num_threads(before)
    exact = scaled_dot_product_attention(*(x.double() for x in (queries, keys, values)), scale=scale)
    stock = scaled_dot_product_attention(queries, keys, values, scale=scale)
    assert (found - exact).abs().max() <= 2 * (stock - exact).abs().max()


@needs_kernel
def test_a_cache_may_have_room_behind_its_tokens_and_between_its_heads():
    queries, keys, values = inputs(2, 3, 4, 300, 40, 48)
    room = [torch.full((2, 500, 3, x.shape[-1] + 9), float("nan"), dtype=x.dtype) for x in (keys, values)]
    views = [x[:, 7:307, :, : y.shape[-1]].transpose(1, 2) for x, y in zip(room, (keys, values), strict=True)]
    for view, x in zip(views, (keys, values), strict=True):
        view.copy_(x)
    assert torch.equal(cpu.attend(queries, *views, 0.2), cpu.attend(queries, keys, values, 0.2))


@needs_kernel
def test_large_scores_neither_overflow_nor_vanish():
    queries, keys, values = inputs(1, 1, 4, 200, 32, 16)
    found = cpu.attend(1000 * queries, keys, values, 1.0)
    best = (queries.double() @ keys.double().transpose(2, 3)).argmax(-1)
    assert torch.equal(found[0, 0], values[0, 0, best[0, 0]])


@needs_kernel
def test_it_is_what_reads_a_bf16_cache_without_gradients():
    queries, keys, values = inputs(1, 1, 4, 100, 32, 16)
    with torch.no_grad():
        assert cpu.usable(queries, keys, values)
        assert torch.equal(read(queries, keys, values, 0.3), cpu.attend(queries, keys, values, 0.3))
        assert not cpu.usable(*(x.float() for x in (queries, keys, values)))
        assert not cpu.usable(queries, keys.mT.contiguous().mT, values)
    assert not cpu.usable(queries, keys, values)


# b, g, queries per head, tokens, width
@needs_kernel
@pytest.mark.parametrize(
    "sizes", [(1, 3, 3, 1000, 64), (2, 2, 5, 77, 40), (3, 1, 9, 16, 128), (2, 4, 1, 1, 18)], ids=str
)
@pytest.mark.parametrize("own", [False, True], ids=["angles shared", "angles of each sequence"])
def test_scores_of_keys_that_are_turned_on_the_way(sizes, own):
    b, g, n, t, d = sizes
    queries, room, _ = inputs(b, g, n, t, d, 1)
    keys = torch.zeros(b, t, g, d + 3).bfloat16()[..., :d].transpose(1, 2).copy_(room)  # token by token, with room
    angles = torch.rand(b if own else 1, t, d // 2).double().mul(9).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    with torch.no_grad():
        found = cpu.turned_scores(queries, keys, cos, sin)
    exact = queries.double() @ rotate(keys.double(), cos.double(), sin.double()).mT
    first, second = keys.double().abs().chunk(2, -1)
    c, s = (x.double().abs()[:, None, :, : d // 2] for x in (cos, sin))
    terms = queries.double().abs() @ torch.cat([first * c + second * s, second * c + first * s], -1).mT
    assert ((found - exact).abs() <= (d + 3) * 2**-24 * terms).all()  # sums of d rounded terms of two products each


@needs_kernel
def test_it_is_what_reads_rebuilt_keys_in_bf16_without_gradients():
    queries, latents, _ = inputs(2, 1, 6, 50, 12, 1)
    decoder, turn = torch.randn(2, 12, 12).bfloat16(), torch.rand(2, 1, 50, 12).bfloat16()
    queries = queries.view(2, 6, 1, 12)
    with torch.no_grad():
        expected = cpu.turned_scores(queries.view(2, 2, 3, 12), materialise(latents, decoder), *turn)
        assert torch.equal(rebuilt_scores(queries, (latents,), decoder, *turn), expected.view(2, 6, 1, 50))
    assert rebuilt_scores(queries, (latents,), decoder, *turn).dtype == torch.bfloat16


# b, g, blocks, tokens of a block, width, channels of a token that share a scale
@needs_kernel
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 4, 8, 96, None), (1, 1, 3, 64, 37, None), (2, 2, 3, 8, 64, 32), (1, 1, 70, 16, 48, 16)], ids=str
)
def test_few_bits_are_decoded_to_the_nearest_number(sizes, bits):
    b, g, n, block, width, group = sizes
    scales = (b, g, n, 1, width) if group is None else (b, g, n, block, width // group)
    codes = torch.randint(2**bits, (b, g, n, block, width)).to(torch.uint8)
    step, low = torch.rand(scales).bfloat16(), torch.randn(scales).bfloat16()
    room = torch.zeros(b, n * block + 5, g, width + 3).bfloat16()
    out = room[:, 2:-3, :, :width].transpose(1, 2)
    cpu.decode(pack(codes, bits), step, low, out, bits, group)
    step, low = (x.double().repeat_interleave(group or 1, -1) for x in (step, low))
    exact, largest = ((codes * step + x).reshape(out.shape) for x in (low, low.abs()))
    # Half of the last of bf16's eight digits; one rounding of the sum in fp32, by as much as its terms are large.
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 2**-23 * largest).all()
    assert not room[:, :2].any()
    assert not room[..., width:].any()


def test_without_a_compiler_pytorch_reads_the_cache_and_the_log_says_so(fresh, tmp_path, caplog):
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setenv("CC", str(tmp_path / "no-compiler"))
    fresh.setattr(cpu, "_processor_has", lambda features: True)
    queries, keys, values = inputs(1, 1, 4, 100, 32, 16)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="mea"):
        found = read(queries, keys, values, 0.3)
    assert "no-compiler" in caplog.text
    assert torch.equal(found, scaled_dot_product_attention(queries, keys, values, scale=0.3))
    with pytest.raises(RuntimeError, match="C compiler"):
        cpu.attend(queries, keys, values, 0.3)


def test_a_compiler_that_fails_leaves_nothing_behind(fresh, tmp_path):
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setenv("CC", "false")
    fresh.setattr(cpu, "_processor_has", lambda features: True)
    assert cpu.library() is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_environment_can_switch_it_off(fresh):
    fresh.setenv("MEA_KERNELS", "reference")
    assert cpu.library() is None
    assert not triton.usable()


def test_a_misspelt_choice_is_refused(fresh):
    fresh.setenv("MEA_KERNELS", "refrence")
    with pytest.raises(ValueError, match="auto"):
        cpu.library()
