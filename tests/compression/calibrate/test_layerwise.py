"""A walk through the layers gives what the model's own forward gives, however the model was loaded."""

from typing import Any

import pytest
import torch

from compression.small import planned, tiny
from mea.compression import Calibration
from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk, run_layer_cached

THETA = {"rope_theta": 10000.0}
LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}, "max_position_embeddings": 64},
    "longrope": {
        "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32, **LONGROPE, **THETA}
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, **THETA}},
}
MODELS = {
    **{rope: ("llama", changes) for rope, changes in ROPES.items()},
    "mistral-narrow": ("mistral", {"sliding_window": 8}),
    "gemma3-narrow": ("gemma3_text", {"sliding_window": 8}),
    "head_dim-is-window": ("llama", {"head_dim": 64}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_short_window_of_a_walk_for_long_ones_is_as_in_the_model(name):
    """Dynamic and long RoPE turn a short window by other angles than the first tokens of a long one."""
    model_type, changes = MODELS[name]
    model = tiny(model_type, **changes)
    ids = torch.randint(0, 256, (1, 24))
    walk = LayerWalk(model, 96)
    walk.inputs(96)
    with torch.no_grad():
        at_once = step_by_step = walk.embed(ids)
        for layer, inputs in zip(walk.layers, walk.inputs(24), strict=True):
            at_once = layer(at_once, **inputs.options)
            step_by_step = run_layer_cached(layer, step_by_step, inputs)
        expected = model.model(ids, use_cache=False).last_hidden_state
        for hidden in (at_once, step_by_step):
            torch.testing.assert_close(model.model.norm(hidden), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("rope", ROPES)
def test_windows_longer_than_the_rope_was_made_for_are_compressed(rope, method):
    model = tiny(**ROPES[rope])
    plan = planned(model.config, method=method, calibration=Calibration(tokens=256, window=64, copy_fraction=0.0))
    tokens = torch.randint(0, 256, (4, 96))
    assert run_plans(LayerWalk(model, 96), tokens, [plan])[0].self_check["full_rank"] < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_an_eager_model_is_compressed_to_the_same_factors_and_stays_eager(model_type):
    """Inputs are recorded for SDPA, whose causal mask is None: eager attention would see later tokens."""
    model = tiny(model_type)
    plan = planned(model.config, calibration=Calibration(tokens=256, window=64, copy_fraction=0.0))
    tokens = torch.randint(0, 256, (4, 64))
    expected = run_plans(LayerWalk(model, 64), tokens, [plan])[0].model.state_dict()
    model.set_attn_implementation("eager")
    result = run_plans(LayerWalk(model, 64), tokens, [plan])[0].model
    assert model.config._attn_implementation == result.config._attn_implementation == "eager"
    for name, tensor in result.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
