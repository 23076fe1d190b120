"""The rotary embedding against transformers' own, and against its reading as complex multiplication."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mea.ops.rope import RopeConfig, Rotary, frequencies, from_complex, rotary, rotate, to_complex

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RopeConfig(theta=5e5), {"rope_type": "default", "rope_theta": 5e5}),
        (
            RopeConfig(theta=5e5, scaling="linear", factor=4.0),
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        ),
        (
            RopeConfig(theta=5e5, scaling="llama3", factor=32.0, **LLAMA3),
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["default", "linear", "llama3"],
)
def test_frequencies_are_those_of_transformers(ours, theirs):
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=theirs)
    name = theirs["rope_type"]
    if name == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[name](config, None)
    assert factor == 1.0
    torch.testing.assert_close(frequencies(64, ours), expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_rotation_is_that_of_transformers(agree):
    x = torch.randn(2, 63, 3, 60, dtype=torch.float64)
    turn = rotary(torch.arange(63)[None], frequencies(60, RopeConfig()).double())
    cos, sin = (torch.cat([part, part], dim=-1) for part in turn)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    agree(rotate(x, turn), expected.transpose(1, 2), terms=2)


@settings(max_examples=25, deadline=None)
@given(pairs=st.integers(1, 40), still=st.integers(0, 12), tokens=st.integers(1, 12), start=st.integers(0, 8000))
def test_rotation_is_complex_multiplication(agree, pairs, still, tokens, start):
    d = 2 * (pairs + still)
    x = torch.randn(2, tokens, 3, d, dtype=torch.float64)
    theta = torch.rand(pairs, dtype=torch.float64)
    positions = torch.arange(start, start + tokens)[None]
    angle = torch.cat([positions[..., None] * theta, torch.zeros(1, tokens, still, dtype=torch.float64)], dim=-1)
    expected = to_complex(x, 2 * pairs) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    agree(rotate(x, rotary(positions, theta)), from_complex(expected, 2 * pairs), terms=2)


@settings(max_examples=25, deadline=None)
@given(pairs=st.integers(0, 20), still=st.integers(0, 20))
def test_complex_view_is_undone(pairs, still):
    x = torch.randn(3, 2 * (pairs + still))
    assert torch.equal(from_complex(to_complex(x, 2 * pairs), 2 * pairs), x)


def test_scores_depend_on_the_distance_only(agree):
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    theta = frequencies(64, RopeConfig()).double()

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(q, rotary(torch.tensor([[i]]), theta)) * rotate(k, rotary(torch.tensor([[j]]), theta))).sum()

    # The angles themselves are rounded: theta * 1000 carries 1000 eps of absolute error into each of the two rotations.
    agree(score(1000, 990), score(10, 0), terms=64 + 2 * 1000)


def test_partial_rotation_leaves_the_other_channels_alone():
    config = RopeConfig(fraction=0.5)
    theta = frequencies(64, config)
    assert theta.shape == (16,)
    x = torch.randn(1, 7, 2, 64)
    turned = rotate(x, rotary(torch.arange(7)[None], theta))
    assert torch.equal(turned[..., 32:], x[..., 32:])
    assert not torch.equal(turned[:, 1:, :, :32], x[:, 1:, :, :32])


def test_low_precision_is_rotated_in_fp32():
    """Angles in bf16 are off by whole radians after a few hundred tokens: they must stay fp32 whatever `x` is."""
    x = torch.randn(1, 300, 1, 64)
    turn = rotary(torch.arange(300)[None], frequencies(64, RopeConfig()))
    exact = rotate(x.bfloat16().float(), turn)
    error = (rotate(x.bfloat16(), turn).float() - exact).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-30).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"\(0, 1\]"),
        ({"theta": 1.0}, "theta > 1"),
        ({"scaling": "llama3", "low_freq_factor": 4.0}, "low_freq_factor < high_freq_factor"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**options)


def test_unknown_scaling_is_refused():
    # With the shape checks on, the annotation refuses it first, and with a TypeError.
    with pytest.raises((ValueError, TypeError), match="yarn"):
        RopeConfig(scaling="yarn")


def test_odd_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="even"):
        RopeConfig(fraction=0.3).rotary_dim(10)
    with pytest.raises(ValueError, match="even"):
        to_complex(torch.randn(2, 7))


def test_rotary_is_a_pair_of_cosine_and_sine():
    turn = rotary(torch.tensor([[0, 1]]), torch.tensor([math.pi / 2]))
    assert isinstance(turn, Rotary)
    torch.testing.assert_close(turn.cos[0, :, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(turn.sin[0, :, 0], torch.tensor([0.0, 1.0]))
