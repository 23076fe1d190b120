"""experiments/cache_bits: latents in another basis give the same model, and quantising them loses less."""

import importlib.util
from pathlib import Path

import pytest
import torch

import mea
from compression.small import tiny
from mea.evaluate.through_cache import reading_in
from mea.models.quantized_cache import CacheFormat
from tiny_models import EVEN, compress, stock

FILE = Path(__file__).parents[2] / "experiments" / "cache_bits" / "balance.py"
SPEC = importlib.util.spec_from_file_location("balance", FILE)
assert SPEC is not None
assert SPEC.loader is not None
balance = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(balance)


def test_balancing_solves_its_equation() -> None:
    """``S moment S = cost`` with ``S`` the square of what is returned."""
    moment, cost = (x @ x.T for x in torch.randn(2, 6, 20).double())
    root, inverse = balance.balancing(moment, cost)
    torch.testing.assert_close(root @ root @ moment @ root @ root, cost)
    torch.testing.assert_close(root @ inverse, torch.eye(6).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("scale", "form"), [(False, "post_rope"), (True, "post_rope"), (True, "pre_rope")])
@torch.no_grad()
def test_the_model_computes_the_same(kind: str, scale: bool, form: str) -> None:
    model = compress(stock(kind), form=form)
    ids = torch.randint(3, 99, (2, 40))
    before, weights = model(input_ids=ids).logits, model.model.layers[0].self_attn.v_proj.weight.clone()
    balance.balance_latents(model, ids, scale=scale)
    assert not torch.equal(model.model.layers[0].self_attn.v_proj.weight, weights)
    after = model(input_ids=ids).logits
    assert (after - before).abs().max() <= 1e-4 * before.abs().max().clamp_min(1.0)


@torch.no_grad()
def test_it_evens_out_channels_of_different_size() -> None:
    """A basis in which one channel is huge costs two-bit tokens much; balanced, most of it is won back."""
    model = compress(stock("llama"))
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "head_mixing"):
            mixing = layer.self_attn.head_mixing
            mixing.key_encoder[0] *= 100
            mixing.key_decoder[..., 0] /= 100
    row = torch.randint(3, 99, (60,))
    read = reading_in(CacheFormat(4, keys="token", values="token", block=8, first=0))
    plain = reading_in(CacheFormat(8, keys="channel", block=64))
    assert read is not None
    assert plain is not None
    exact = plain(model, row)  # shorter than a block: nothing is quantised
    lost = (read(model, row) - exact).abs().mean()
    balance.balance_latents(model, row[None])
    assert (read(model, row) - exact).abs().mean() < 0.7 * lost


def test_nothing_to_balance() -> None:
    with pytest.raises(ValueError, match="no layer of this model caches latents"):
        balance.balance_latents(stock("llama"), torch.randint(3, 99, (1, 8)))


def test_joint_latents_are_not_balanced() -> None:
    with pytest.raises(ValueError, match="joint latents cannot be balanced"):
        balance.balance_latents(compress(stock("llama"), EVEN, "joint"), torch.randint(3, 99, (1, 8)))


def test_latents_of_groups_are_not_balanced(tokenizer, calibration) -> None:
    small = mea.compress(tiny(), tokenizer, method="post_rope", groups=2, keep=0.5, calibration=calibration)
    with pytest.raises(ValueError, match="compress without groups"):
        balance.balance_latents(small, torch.zeros(1, 8, dtype=torch.long))
