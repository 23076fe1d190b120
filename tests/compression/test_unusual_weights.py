"""Zero and low-rank weights are legal and compress; weights that overflow are refused by layer and name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compression.small import planned, tiny
from mea.compression import Calibration
from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk

Change = Callable[[Any], None]


def run(method: str, change: Change) -> tuple[Any, Any]:
    """The original and the compressed model."""
    model = tiny(max_position_embeddings=1024)
    with torch.no_grad():
        change(model)
    tokens = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(1))
    keep = 0.3 if method in ("predictive", "joint") else 0.5
    plan = planned(model.config, method=method, keep=keep, calibration=Calibration(tokens=1024, window=128))
    return model, run_plans(LayerWalk(model), tokens, [plan])[0].model


def zero(model: Any, *names: str) -> None:
    for name in names:
        model.get_parameter(f"model.layers.{name}.weight").zero_()


def keys_and_values(model: Any) -> None:
    zero(model, "0.self_attn.k_proj", "1.self_attn.v_proj")
    for name in ("k_proj", "v_proj"):
        weight = model.get_parameter(f"model.layers.2.self_attn.{name}.weight")
        weight.copy_(weight[:, :1] @ weight[:1])


def around_them(model: Any) -> None:
    zero(model, "0.self_attn.q_proj", "1.self_attn.o_proj", "2.input_layernorm")


def everything(model: Any) -> None:
    for parameter in model.parameters():
        parameter.zero_()


@pytest.mark.parametrize(
    ("method", "change"),
    [*[("predictive", change) for change in (keys_and_values, around_them, everything)], ("joint", keys_and_values)],
)
def test_zero_and_rank_one_weights_compress(method: str, change: Change) -> None:
    model, compressed = run(method, change)
    ids = torch.randint(0, 256, (1, 100))
    with torch.no_grad():
        expected, got = model(ids).logits, compressed(ids).logits
    assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("method", ["post_rope", "pre_rope", "svd"])
def test_methods_that_lower_ranks_take_zero_weights(method: str) -> None:
    def change(model: Any) -> None:
        zero(model, "0.self_attn.k_proj", "1.self_attn.o_proj", "2.input_layernorm")

    _, compressed = run(method, change)
    with torch.no_grad():
        assert compressed(torch.randint(0, 256, (1, 100))).logits.isfinite().all()


def test_a_method_that_cannot_be_fitted_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer 1: gauge cannot be fitted .*: give predictive or joint"):
        run("gauge", lambda model: zero(model, "1.self_attn.v_proj"))


@pytest.mark.parametrize("method", ["predictive", "svd"])
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("model.layers.1.self_attn.v_proj", 1e30, r"layer 1: .*largest weight is .* in self_attn\.v_proj\.weight"),
        ("model.layers.1.self_attn.k_proj", 1e30, r"layer 1: .*largest weight is .* in self_attn\.k_proj\.weight"),
        ("model.layers.1.self_attn.o_proj", 1e30, r"layer 1: .*largest weight is .* in self_attn\.o_proj\.weight"),
        ("model.layers.1.mlp.up_proj", 1e30, r"layer 1: .*largest weight is .* in mlp\.up_proj\.weight"),
        ("model.embed_tokens", 1e30, "embed_tokens: the embeddings overflow, and its largest weight is"),
        ("lm_head", 1e38, "lm_head: logits are not finite; the model overflows"),
    ],
)
def test_what_overflows_is_named(method: str, name: str, size: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(method, lambda model: model.get_parameter(f"{name}.weight").mul_(size))


def test_one_flipped_bit_of_an_exponent_is_named() -> None:
    def flip(model: Any) -> None:
        model.get_parameter("model.layers.2.mlp.down_proj.weight")[3, 3] = 2.0**127

    with pytest.raises(ValueError, match=r"layer 2: .*largest weight is 1\.7e\+38 in mlp\.down_proj\.weight"):
        run("predictive", flip)
