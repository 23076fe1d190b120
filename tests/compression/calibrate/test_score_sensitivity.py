"""Costs of errors in scores against derivatives of the attention, and keys that are fitted by them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compression.methods.test_methods import N, statistics
from compression.small import tiny
from mea.compression.calibrate.layerwise import AttentionPass, LayerInputs, LayerWalk, run_layer
from mea.compression.calibrate.score_sensitivity import ScoreMomentsSum
from mea.compression.calibrate.statistics import EVERY, LayerStatistics, ScoreMoments, project
from mea.compression.methods import METHODS
from mea.compression.methods.baselines.post_rope import moments

LENGTH = 8


def seen(kind: str) -> tuple[torch.nn.Module, LayerInputs, AttentionPass]:
    model = tiny(kind)
    with torch.no_grad():
        hidden = LayerWalk(model).embed(torch.randint(0, 256, (1, LENGTH)))
        inputs = LayerWalk(model).inputs(LENGTH)[0]
        return model.model.layers[0].self_attn, inputs, next(iter(run_layer(model.model.layers[0], hidden, inputs)))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_costs_are_squared_derivatives_of_the_output_by_single_scores(kind: str) -> None:
    attention, inputs, window = seen(kind)
    with torch.no_grad():
        projected = project(attention, window.attention_in)
        found = ScoreMomentsSum(attention, inputs).costs(window, projected).flatten(0, 1)  # h t_queries t
    queries, keys, values = (x.repeat_interleave(len(x0) // len(x), 0) for x0, x in _with_queries(attention, window))
    rotated = _rotated(attention, inputs, queries, keys)
    scores = (rotated[0] @ rotated[1].mT * attention.scaling + inputs.mask[0]).detach()

    def output(scores: Tensor) -> Tensor:
        heads = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
        return attention.o_proj(heads)

    derivative = torch.autograd.functional.jacobian(output, scores)  # t D, h t t
    assert isinstance(derivative, Tensor)
    expected = derivative.square().sum(1)  # t, h t t: a query's output depends on its own scores only
    expected = expected.diagonal(dim1=0, dim2=2).permute(2, 0, 1) * window.weight[:, None, None]  # t h t
    expected = expected[EVERY - 1 :: EVERY].transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.max())
    assert expected.max() > 0


def _with_queries(attention: torch.nn.Module, window: AttentionPass) -> list[tuple[Tensor, Tensor]]:
    projected = project(attention, window.attention_in)
    return [(projected.queries, each.detach()) for each in projected]


def _rotated(attention: torch.nn.Module, inputs: LayerInputs, queries: Tensor, keys: Tensor) -> list[Tensor]:
    cos, sin = inputs.position_embeddings
    turned = []
    for x in (queries, keys):
        half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        turned.append(x * cos[0] + half * sin[0])
    return turned


def test_moments_are_sums_over_tokens_that_count_by_their_costs() -> None:
    attention, inputs, window = seen("llama")
    with torch.no_grad():
        total = ScoreMomentsSum(attention, inputs)
        total.add(window)
        queries, keys, _ = projected = project(attention, window.attention_in)
        costs, found = total.costs(window, projected), total.result()
    rows = keys.transpose(0, 1).flatten(1).double()
    outer = rows[:, :, None] * rows[:, None] * costs.sum((0, 1, 2))[:, None, None]
    for got, parts in ((found.first, outer[:1]), (found.keys, outer[1:])):
        # In fp32 each factor and its weight's root are rounded, and the products as they are added up.
        assert ((got - parts.sum(0)).abs() <= (len(parts) + 6) * 2**-24 * parts.abs().sum(0)).all()
    own = queries.unflatten(0, (len(keys), -1))[:, :, EVERY - 1 :: EVERY]
    outer = own[..., :, None] * own[..., None, :] * costs.sum(3)[..., None, None]
    torch.testing.assert_close(found.queries, outer.sum((1, 2)).double(), rtol=1e-5, atol=1e-8)


def test_sensitivity_keys_are_the_uniform_ones_where_all_scores_count_alike() -> None:
    given = statistics()
    other = METHODS["post_rope:uniform"].keys(given, 10).projection
    for name in ("post_rope:sensitivity", "post_rope"):
        torch.testing.assert_close(METHODS[name].keys(given, 10).projection, other, rtol=0, atol=1e-9)


def test_mean_keys_lie_between_those_of_the_two_weightings() -> None:
    """With one metric they minimise a sum of both losses: each is at most what the other's minimiser has of it."""
    given = statistics()
    looked_at = torch.randn(N, N // 2, dtype=torch.float64)
    none = torch.zeros(N, N, dtype=torch.float64)
    given = replace(given, scores=ScoreMoments(looked_at @ looked_at.T, none, given.queries))
    losses = {}
    for name in ("post_rope:sensitivity", "post_rope", "post_rope:uniform"):
        missing = torch.eye(N, dtype=torch.float64) - METHODS[name].keys(given, 10).projection
        for kind in ("sensitivity", "uniform"):
            keys, metric = moments(given, kind)
            losses[name, kind] = (torch.block_diag(*metric) @ missing @ keys @ missing.T).trace().item()
    for kind, other in (("sensitivity", "uniform"), ("uniform", "sensitivity")):
        own = losses[f"post_rope:{kind}", kind]
        assert own <= losses["post_rope", kind] * (1 + 1e-9) < losses[f"post_rope:{other}", kind]


def with_first(share: float) -> tuple[LayerStatistics, Tensor]:
    given, first = statistics(), torch.randn(N, 1, dtype=torch.float64)
    own = share * given.keys.trace() * first @ first.T / first.square().sum()
    return replace(given, scores=ScoreMoments(given.keys, own, given.queries)), first


def test_a_first_token_that_everybody_reads_is_kept_by_one_dimension() -> None:
    """Averaged over positions its key would turn through many; at position 0 it is one direction."""
    given, first = with_first(1e6)
    lost = [((METHODS[name].keys(given, 4).projection @ first - first).norm() / first.norm()).item()
            for name in ("post_rope:sensitivity", "post_rope:uniform")]  # fmt: skip
    assert lost[0] < 1e-3 < 1e-1 < lost[1]


def test_the_first_token_is_scaled_as_the_others_are() -> None:
    """A rotary embedding with a factor (YaRN) has it at position 0 as well."""
    given, _ = with_first(0.3)
    scaled = replace(given, cos=3 * given.cos, sin=3 * given.sin)
    own, other = (METHODS["post_rope:sensitivity"].keys(moments, 10).projection for moments in (given, scaled))
    torch.testing.assert_close(own, other, rtol=0, atol=1e-9)
