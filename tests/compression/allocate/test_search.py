"""Ranks chosen by measured exchanges: in the budget, within the options, and no worse than where they began."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import mea
from compression.small import planned, tiny
from mea.compression import Allocation, compress_to_folder, save
from mea.compression.allocate import search
from mea.compression.allocate.candidates import BOTH, KEYS, VALUES, RankCandidates
from mea.compression.allocate.held_out_loss import HeldOut
from mea.compression.allocate.search import search_ranks
from mea.compression.api import run_plans
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import calibration_tokens, held_out_tokens
from mea.compression.fit import FittedLayer
from mea.compression.methods.base import Method
from mea.compression.options import CompressOptions
from mea.compression.plan import make_plan
from mea.evaluate.perplexity import token_losses
from mea.records import read_record


def uneven():
    """A tiny model whose last layer's attention hardly reaches the output: its cache is worth little."""
    model = tiny()
    model.model.layers[2].self_attn.o_proj.weight.data *= 0.01
    return model


def chosen(model, tokenizer, calibration, **options):
    plan = planned(model.config, keep=0.5, calibration=calibration)
    tokens = calibration_tokens(tokenizer, calibration)
    held_out = HeldOut(LayerWalk(model), held_out_tokens(tokenizer, calibration, 256, 64), torch.float32)
    return plan, search_ranks(
        LayerWalk(model), tokens, held_out, plan.method, plan.shape, plan.layout, **({"tries": 16} | options)
    )


def test_bytes_go_to_the_layers_that_need_them(tokenizer, calibration):
    plan, tried = chosen(uneven(), tokenizer, calibration)
    best = min(tried, key=lambda each: each.divergence)
    assert all(each.layout.keep(plan.shape) <= 0.5 for each in tried)
    assert tried[0].layout == plan.layout
    assert best.divergence < 0.95 * tried[0].divergence
    sums = [sum(pair) for pair in best.layout.ranks]
    assert sums[2] < min(sums[:2])


def test_a_tried_divergence_is_that_of_the_compressed_model(tokenizer, calibration):
    model = uneven()
    plan, tried = chosen(model, tokenizer, calibration)
    tokens = calibration_tokens(tokenizer, calibration)
    text = held_out_tokens(tokenizer, calibration, 256, 64)
    for each in (tried[0], tried[-1]):
        (result,) = run_plans(LayerWalk(model), tokens, [replace(plan, layout=each.layout)])
        with torch.no_grad():
            own, true = (m(text).logits[:, :-1].log_softmax(-1) for m in (result.model, model))
        assert each.divergence == pytest.approx((true.exp() * (true - own)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("options", [{"equal": True}, {"same": True}, {"step": 16}, {"equal": True, "same": True}])
def test_options_hold(tokenizer, calibration, options):
    _, tried = chosen(uneven(), tokenizer, calibration, **options)
    for layout in (each.layout for each in tried):
        if options.get("equal"):
            assert all(keys == values for keys, values in layout.ranks)
        if options.get("same"):
            assert len(set(layout.ranks)) == 1
        assert all(width % options.get("step", 8) == 0 for pair in layout.ranks for width in pair)


def test_every_layout_is_better_than_the_one_before(tokenizer, calibration):
    """But for the last, whose factors are fitted anew; that one is better than the first."""
    _, tried = chosen(uneven(), tokenizer, calibration)
    divergences = [each.divergence for each in tried]
    assert divergences[:-1] == sorted(set(divergences[:-1]), reverse=True)
    assert divergences[-1] < divergences[0]


def test_the_same_seed_chooses_the_same(tokenizer, calibration):
    assert chosen(uneven(), tokenizer, calibration) == chosen(uneven(), tokenizer, calibration)


def test_where_no_exchange_is_possible_the_start_stays(tokenizer, calibration):
    """As many keys as values, and the same in all layers: nothing can be exchanged."""
    plan, tried = chosen(uneven(), tokenizer, calibration, equal=True, same=True)
    assert [each.layout for each in tried] == [plan.layout]


def test_what_a_step_leaves_over_is_spent(tokenizer, calibration):
    """Ranks of 24 in steps of 16 begin at 16; what that leaves makes some of them 32."""
    plan = planned(tiny().config, keep=0.75, calibration=calibration)
    assert plan.layout.ranks == ((24, 24),) * 3
    tokens = calibration_tokens(tokenizer, calibration)
    held_out = HeldOut(LayerWalk(uneven()), held_out_tokens(tokenizer, calibration, 256, 64), torch.float32)
    tried = search_ranks(LayerWalk(uneven()), tokens, held_out, plan.method, plan.shape, plan.layout, step=16, tries=16)
    assert tried[0].layout.ranks == ((16, 16),) * 3
    assert sum(map(sum, tried[-1].layout.ranks)) == 144


def candidate(lost: dict[tuple[int, int], float]) -> RankCandidates:
    fitted = {pair: FittedLayer(0, None, None, None, None, value) for pair, value in lost.items()}
    return RankCandidates((16, 16), 8, fitted, {KEYS: 2.0, VALUES: 3.0, BOTH: 5.0})


def test_a_promise_is_what_is_lost_times_what_that_matters():
    one = candidate({(16, 16): 0.3, (24, 16): 0.2, (16, 24): 0.1, (24, 24): 0.05})
    assert one.promise((16, 16), KEYS, 1) == pytest.approx(2 * (0.2 - 0.3))
    assert one.promise((24, 24), KEYS, -1) == pytest.approx(2 * (0.3 - 0.2))
    assert one.promise((24, 16), VALUES, 1) == pytest.approx(3 * (0.1 - 0.3))
    assert one.promise((16, 16), BOTH, 1) == pytest.approx(5 * (0.05 - 0.3))


def test_ranks_without_factors_are_not_offered():
    one = candidate({(16, 16): 0.3, (24, 16): 0.2, (16, 8): 0.5})
    assert one.turned((16, 16), KEYS, 1) == (24, 16)
    assert one.turned((24, 16), VALUES, -1) == (24, 8)  # put together of two fits
    assert one.turned((16, 16), VALUES, 1) is None
    assert one.turned((16, 16), BOTH, 1) is None


def test_in_memory(tokenizer, calibration):
    small = mea.compress(
        uneven(), tokenizer, method="post_rope", calibration=calibration, allocate=Allocation(tokens=256)
    )
    assert small.config.compression["allocation"]["tokens"] == 256
    assert sum(map(sum, small.config.latent_ranks)) <= 96


def test_a_folder_goes_on_with_the_layout_that_it_has_chosen(saved, tokenizer, calibration, tmp_path, monkeypatch):
    uneven().save_pretrained(saved)
    out, options = tmp_path / "out", {"method": "post_rope", "calibration": calibration, "measure_tokens": 0}
    how = Allocation(tokens=256)
    run = save.run_plans

    def stopped(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "run_plans", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress_to_folder(str(saved), out, allocate=how, **options)
    left = json.loads((tmp_path / "out.partial" / "choice" / "layout.json").read_text())
    monkeypatch.setattr(save, "run_plans", run)
    monkeypatch.setattr(search, "search_ranks", None)  # not made again
    compress_to_folder(str(saved), out, allocate=how, **options)
    record = read_record(out / "compression.json")
    assert record["config"]["ranks"] == left[-1][0]
    assert [[each["ranks"], each["divergence"]] for each in record["results"]["tried"]] == left
    model = AutoModelForCausalLM.from_pretrained(out)
    assert token_losses(model, torch.arange(64), 32).isfinite().all()


@pytest.mark.parametrize("stop", [("fitting at several ranks", 2), ("trying exchanges", 1), ("trying exchanges", 9)])
def test_a_choice_goes_on_where_it_was_stopped(tokenizer, calibration, tmp_path, monkeypatch, stop):
    def stopping(what, done, _of):
        if (what, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chosen(uneven(), tokenizer, calibration, folder=tmp_path, progress=stopping)
    kept = list(tmp_path.rglob("ranks-*/0*.safetensors"))
    path = tmp_path / "measured.json"
    before = len(json.loads(path.read_text())) if path.is_file() else 0
    assert kept
    fits, runs = counted(monkeypatch, Method, "fit"), counted(monkeypatch, search, "_run")
    went_on = chosen(uneven(), tokenizer, calibration, folder=tmp_path)
    rest, again = len(fits), len(runs)
    assert went_on == chosen(uneven(), tokenizer, calibration)
    assert len(fits) - rest == rest + len(kept)
    assert len(runs) - again - again in (before, before - 1)  # the best so far has to be run once more to go on from it


def counted(monkeypatch, module, name):
    """The calls of a function from here on."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given) or function(*given))
    return calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "deep"}, "instead of a layout of some"),
        ({"allocate": Allocation(step=12)}, "multiples of 8"),
        ({"method": "svd", "keep": 0.375, "allocate": Allocation(equal=True)}, "odd number of key and value heads"),
    ],
)
def test_what_cannot_be_allocated_is_refused_before_any_work(calibration, options, message):
    with pytest.raises(ValueError, match=message):
        planned(tiny().config, calibration=calibration, **({"allocate": True} | options))


def test_a_context_in_bytes_is_refused_with_sliding_windows(calibration):
    with pytest.raises(ValueError, match="sliding windows"):
        make_plan(
            tiny("gemma3_text").config,
            4,
            CompressOptions(budget="256 tokens in 40 kB", method="post_rope", calibration=calibration, allocate=True),
        )
