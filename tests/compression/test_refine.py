"""Refinement: what it may change, that it never makes a layer worse, and that an interrupted one goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mea
from compression.small import EXTRAS, planned, tiny
from mea.compression import Calibration
from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import calibration_tokens
from mea.compression.options import Refinement
from mea.compression.refine import refine_layers, spread_positions
from mea.compression.save import compress_to_folder

HOW = Refinement(passes=10, window=16, batch=2, held_out=4, lr=3e-3, base_lr=1e-3)


def refined(model: Any, tokenizer: Any, calibration: Calibration, **options: Any) -> Any:
    plan = planned(model.config, calibration=calibration, **{"keep": 0.5, "refine": HOW, **options})
    return run_plans(LayerWalk(model), calibration_tokens(tokenizer, calibration), [plan])[0]


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *(pytest.param(each, "post_rope:uniform", marks=pytest.mark.slow) for each in EXTRAS),
        *(("llama", method) for method in ("post_rope:uniform", "shared", "svd")),
    ],
)
def test_layers_come_nearer_to_the_originals(
    architecture: str, method: str, tokenizer: Any, calibration: Calibration
) -> None:
    model = tiny(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    # Half of the numbers of this model's cache are as many as its width: a joint latent of them loses nothing.
    result = refined(model, tokenizer, calibration, method=method, keep=0.25 if method == "shared" else 0.5)

    losses = [pair for pair in result.refined.layers if pair]
    assert len(losses) == 3
    assert all(pair.after <= pair.before for pair in losses)
    assert any(pair.after < 0.9 * pair.before for pair in losses)
    # Nothing of the original changed, although the two share what was not trained.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    attention = result.model.model.layers[0].self_attn
    assert attention.q_proj.weight is not model.model.layers[0].self_attn.q_proj.weight
    assert result.model.model.layers[0].mlp is not None
    assert result.model.config.compression["refinement"]["passes"] == 10


@pytest.mark.parametrize("architecture", ["llama", "granite"])  # the latter divides its logits
def test_the_last_layer_brings_the_next_token_distribution_nearer(architecture: str) -> None:
    model, tokens = tiny(architecture), torch.randint(0, 256, (16, 64))
    how = Refinement(passes=4, window=16, batch=2, held_out=4, lr=1e-3, base_lr=3e-4)
    calibration = Calibration(tokens=tokens.numel(), window=64)
    result = run_plans(LayerWalk(model), tokens, [planned(model.config, refine=how, calibration=calibration)])[0]
    found = result.refined.divergence
    assert found.after < found.before  # by a percent or less: a random model's errors have no pattern to make up for
    # What was reported is the whole model's, on windows that nothing was trained on.
    rows = tokens.reshape(-1, how.window)
    places = spread_positions(*rows.shape, model.config.max_position_embeddings, torch.Generator().manual_seed(0))
    held_out = [i for i in range(len(rows)) if i % how.held_out == how.held_out - 1]
    with torch.no_grad():
        own, true = (
            each(rows[held_out], position_ids=places[held_out], use_cache=False).logits.double().log_softmax(-1)
            for each in (result.model, model)
        )
    expected = (true.exp() * (true - own)).sum(-1).mean().item()
    # Products are rounded to bfloat16 where the processor has it: some percent of a divergence this small.
    assert found.after == pytest.approx(expected, rel=0.1)


def test_layers_that_lose_nothing_stay_as_they_are(tokenizer: Any, calibration: Calibration) -> None:
    """At full rank there is nothing to gain: what training adds is noise, and is not taken."""
    model = tiny()
    result = refined(model, tokenizer, calibration, keep=1.0)
    plain = run_plans(
        LayerWalk(model),
        calibration_tokens(tokenizer, calibration),
        [planned(model.config, keep=1.0, calibration=calibration)],
    )[0]
    first = (result.model.model.layers[0].self_attn, plain.model.model.layers[0].self_attn)
    same = [torch.equal(a, b) for a, b in zip(first[0].parameters(), first[1].parameters(), strict=True)]
    assert all(same) or result.refined.layers[0].after < result.refined.layers[0].before


def test_layers_left_alone_by_the_layout_are_not_refined(tokenizer: Any, calibration: Calibration) -> None:
    model = tiny()
    result = refined(model, tokenizer, calibration, keep=None, layout="half")
    assert [pair is not None for pair in result.refined.layers] == [
        each is not None for each in result.plan.layout.ranks
    ]


def test_a_run_that_was_stopped_while_refining_goes_on(
    saved: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "post_rope", "calibration": calibration, "measure_tokens": 0, "refine": HOW}
    compress_to_folder(str(saved), tmp_path / "whole", **options)

    def stop(what: str, done: int, _: int) -> None:
        if what == "refining" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_to_folder(str(saved), tmp_path / "stopped", progress=stop, **options)
    assert not (tmp_path / "stopped").exists()
    trained: list[int] = []

    def counted(*args: Any, keep: Any, **rest: Any) -> Any:
        return refine_layers(*args, keep=lambda index, found: (trained.append(index), keep(index, found)), **rest)

    monkeypatch.setattr(sys.modules["mea.compression.api"], "refine_layers", counted)
    compress_to_folder(str(saved), tmp_path / "stopped", **options)

    assert trained == [2]
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_positions_are_runs_over_all_that_the_model_supports() -> None:
    positions = spread_positions(400, 16, 512, torch.Generator().manual_seed(0))
    assert ((positions[:, 1:] - positions[:, :-1]) == 1).all()
    starts = positions[:, 0]
    assert starts.min() == 0
    assert positions.max() <= 511
    # As many begin in each octave, and as many at 0: six parts, of which each is within three standard deviations.
    counts = torch.tensor([(starts == 0).sum(), *(((starts >= a) & (starts < 2 * a)).sum() for a in (16, 32, 64, 128))])
    assert (counts - 400 / 6).abs().max() < 3 * (400 / 6 * 5 / 6) ** 0.5


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_position_embeddings_are_the_models_own(architecture: str) -> None:
    model = tiny(architecture)
    positions = torch.stack([torch.arange(9), 100 + torch.arange(9)])
    found = LayerWalk(model).position_embeddings(positions)
    seen: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _m, _a, options: seen.append(options["position_embeddings"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model(input_ids=torch.ones(1, 9, dtype=torch.long), position_ids=positions[1:], use_cache=False)
    for handle in handles:
        handle.remove()
    for (cos, sin), (true_cos, true_sin) in zip(found, seen, strict=True):
        assert torch.equal(cos[1], true_cos[0])
        assert torch.equal(sin[1], true_sin[0])


def test_what_cannot_be_is_refused(tokenizer: Any, calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="at least 1 pass"):
        mea.compress(tiny(), tokenizer, method="post_rope", calibration=calibration, refine=-1)
    with pytest.raises(ValueError, match="learning rates must be positive"):
        Refinement(lr=0.0)
    model = tiny()
    plan = planned(model.config, calibration=calibration)
    tokens = calibration_tokens(tokenizer, calibration)
    made = run_plans(LayerWalk(model), tokens, [plan])[0].model
    with pytest.raises(ValueError, match="at least 3 windows"):
        refine_layers(LayerWalk(model), made, tokens[:2], Refinement(window=64))
