"""Recovery training: repeatable, never worse, and training just what it says."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compression.small import packed
from mea.models.lm_head import LMHead, distance
from mea.ops.precision import named_dtype
from mea.train.recovery.api import recover
from mea.train.recovery.data import overlaps, windows
from mea.train.recovery.loss import Distilled
from mea.train.recovery.parameters import choose, factors, sizes
from mea.train.recovery.settings import recovery
from mea.train.recovery.trainer import DivergedError, RecoveryTrainer
from tiny_models import compress, stock

WINDOW = 16
SMALL: dict[str, Any] = {
    "window": WINDOW,
    "batch": 4,
    "micro_batch": 2,
    "tokens": 12 * 4 * WINDOW,
    "held_out": 4 * WINDOW,
    "precision": "float32",
    "evaluations": 4,
    "checkpoints": 4,
    "lr": 3e-2,  # relative; the tensors of these models have an RMS of about a tenth
    "base_lr": 1e-2,
}


@pytest.fixture
def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    original = stock("llama")
    return compress(original), original


def rows(count: int = 48) -> torch.Tensor:
    return torch.randint(1, 99, (count, WINDOW), generator=torch.Generator().manual_seed(count))


def run(pair: Any, folder: Path, stage: str = "distill", progress: Any = None, **changes: Any) -> Any:
    student, original = copy.deepcopy(pair)
    settings = recovery(stage, **{**SMALL, **changes})
    return recover(student, original, rows(), rows(4), settings, folder, progress=progress)


def changed(before: Any, after: Any) -> set[str]:
    there = dict(before.named_parameters())
    return {name for name, parameter in after.named_parameters() if not torch.equal(parameter, there[name])}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", ["distill", "cpt"])  # relative rates and absolute ones
def test_a_run_that_was_interrupted_ends_in_the_same_state(pair, tmp_path, stage):
    whole = run(pair, tmp_path / "whole", stage)

    def stop(what: str, done: int, of: int) -> None:
        if what.startswith("recovering") and done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        run(pair, tmp_path / "parts", stage, progress=stop)
    assert (tmp_path / "parts" / "checkpoint-6").is_dir()
    resumed = run(pair, tmp_path / "parts", stage)
    assert resumed.losses == whole.losses
    assert resumed.curve == whole.curve
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("stage", ["distill", "cpt"])
def test_every_stage_lowers_what_it_minimises(pair, tmp_path, stage):
    scale = 1 if recovery(stage).relative else 0.1
    result = run(pair, tmp_path, stage, lr=scale * 3e-2, base_lr=scale * 1e-2)
    losses = [point["loss"] for point in result.losses]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_small_divergence_between_large_logits_is_exact(pair):
    """Sums of 64 by 49,152 numbers that cancel: a plain dot product in fp32 was 2 % off, and by how many threads."""
    generator = torch.Generator().manual_seed(0)
    head = copy.deepcopy(pair[1])
    head.lm_head = torch.nn.Linear(16, 49_152, bias=False)
    torch.nn.init.normal_(head.lm_head.weight, std=1.0, generator=generator)
    states = torch.randn(64, 16, generator=generator)
    own = states + 0.05 * torch.randn(64, 16, generator=generator)
    shift = torch.full((49_152, 1), 3.0)  # logits far from nought, as language models have them
    with torch.no_grad():
        head.lm_head.weight.copy_(torch.cat([head.lm_head.weight[:, :15], shift], dim=1))
    states[:, 15] = own[:, 15] = 6.0
    logs = [(x.double() @ head.lm_head.weight.double().T).log_softmax(-1) for x in (states, own)]
    exact = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
    _, parts = distance(own, LMHead(head), (states, LMHead(head)), torch.zeros(64, dtype=torch.long))
    assert parts[0].item() == pytest.approx(exact, rel=1e-4)


def test_relative_rates_are_the_same_share_of_every_tensor(pair, tmp_path):
    student, original = copy.deepcopy(pair)
    nought = next(parameter for name, parameter in student.named_parameters() if "norm" in name)
    torch.nn.init.zeros_(nought)
    settings = recovery(**{**SMALL, "lr": 1e-3, "base_lr": 1e-4})
    own = list(factors(student).values())
    module = Distilled(student, original, kl=1.0, ce=0.0)
    groups = RecoveryTrainer(module, own, rows(), dict, settings, tmp_path).create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for parameter in student.parameters():
        share = 1e-3 if any(parameter is each for each in own) else 1e-4
        size = 1e-3 if parameter is nought else parameter.detach().square().mean().sqrt().item()
        assert rates[id(parameter)] == pytest.approx(share * size)


def test_distillation_comes_nearer_to_the_original_on_held_out_text(pair, tmp_path):
    # Held-out tokens here are random, so that only the divergence says anything. Twelve steps on a model this small
    # take off 4 to 23 %, depending on its weights; steps in the wrong direction would add more than that.
    first, *_, last = run(pair, tmp_path).curve
    assert last["kl"] < 0.99 * first["kl"]


def test_the_result_is_the_best_state_seen_and_never_worse_than_the_start(pair, tmp_path):
    student, original = copy.deepcopy(pair)
    useless = torch.ones_like(rows())  # one word again and again: it makes all others less likely
    settings = recovery("cpt", **{**SMALL, "lr": 0.01, "base_lr": 0.01})
    result = recover(student, original, useless, rows(4), settings, tmp_path)
    assert result.curve[-1]["ce"] > result.curve[0]["ce"]
    assert result.best == min(result.curve, key=lambda point: point["ce"])
    module = Distilled(result.model, pair[1], kl=1.0, ce=0.0).eval()
    with torch.no_grad():
        measured = module(rows(4))["ce"].item() * WINDOW / (WINDOW - 1)
    assert measured == pytest.approx(result.best["ce"], rel=1e-5)  # in parts of 2 windows, and of 4 here


@pytest.mark.parametrize(("stage", "chosen"), [("distill", 2), ("cpt", 1)])
def test_distillation_chooses_by_nearness_among_states_that_predict_no_worse(pair, tmp_path, stage, chosen):
    student, original = copy.deepcopy(pair)
    scores = [{"ce": ce, "kl": kl} for ce, kl in ((3.0, 0.2), (2.9, 0.15), (2.95, 0.1), (3.1, 0.05))]
    settings = recovery(stage, **{**SMALL, "tokens": 3 * 4 * WINDOW, "evaluations": 3})
    module = Distilled(student, original, kl=float(stage == "distill"), ce=float(stage == "cpt"))
    trainer = RecoveryTrainer(module, [], rows(), iter(scores).__next__, settings, tmp_path)
    trainer.train()
    assert {name: trainer.restore_best()[name] for name in ("ce", "kl")} == scores[chosen]


def test_the_curve_has_the_start_and_the_end_whatever_the_interval(pair, tmp_path):
    curve = run(pair, tmp_path, evaluations=5).curve  # every 2 steps of 12, and every 5 of 13
    assert [point["tokens"] for point in curve] == [64 * step for step in range(0, 13, 2)]
    curve = run(pair, tmp_path / "odd", evaluations=2, tokens=11 * 64).curve
    assert [point["tokens"] for point in curve] == [64 * step for step in (0, 6, 11)]


def test_what_is_trained_is_what_was_chosen(pair, tmp_path):
    start, _ = pair
    own = set(factors(start))
    attention = {name for name, _ in start.named_parameters() if ".self_attn." in name}
    everything = {name for name, _ in start.named_parameters()}
    assert own < attention < everything
    for trained, expected in (("factors", own), ("attention", attention), ("all", everything)):
        result = run(pair, tmp_path / trained, trained=trained)
        assert changed(start, result.model) == expected, trained
        assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_low_rank_updates_are_merged_into_an_ordinary_model(pair, tmp_path):
    pytest.importorskip("peft")
    start, _ = pair
    result = run(pair, tmp_path, trained="lora", rank=2)
    assert type(result.model) is type(start)
    assert list(result.model.state_dict()) == list(start.state_dict())
    linear = {f"{name}.weight" for name, module in start.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed(start, result.model) == set(factors(start)) | (linear - {"lm_head.weight"})
    name = "model.layers.0.mlp.up_proj.weight"
    before = start.get_parameter(name)
    update = (result.model.get_parameter(name) - before).detach().double()
    values = torch.linalg.svdvals(update)
    # What is left beyond rank 2 is the rounding of the sum of weights and update to fp32.
    assert values[1] > 100 * values[2]


def test_a_step_of_a_low_rank_update_is_the_share_of_its_weight_that_the_rate_says(pair, tmp_path):
    pytest.importorskip("peft")
    settings = recovery(trained="lora", rank=4)
    student = choose(copy.deepcopy(pair[0]), settings)
    layer = student.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    second = layer.lora_B["default"].weight
    with torch.no_grad():  # as Adam's first step goes: one size, any signs
        second.copy_(torch.randint(0, 2, second.shape).mul(2).sub(1) * 0.01 * sizes(student)[second])
    update, weight = (
        each.detach().square().mean().sqrt().item()
        for each in (layer.get_delta_weight("default"), layer.base_layer.weight)
    )
    # Sums of 4 products with random signs: their mean square over hundreds of entries is right within some percent.
    assert update == pytest.approx(0.01 * weight, rel=0.2)


def test_a_loss_that_is_no_number_is_reported_with_the_rates(pair, tmp_path):
    student, original = pair
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(DivergedError, match="nan"):
        recover(student, original, rows(), rows(4), recovery(**SMALL), tmp_path)


def test_the_gradient_of_the_distance_is_that_of_plain_autograd(pair):
    student, original = (model.double() for model in pair)
    ids = rows(3)
    module = Distilled(student, original, kl=0.7, ce=0.4).train()
    module(ids)["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    own, other = student(ids).logits.log_softmax(-1), original(ids).logits.log_softmax(-1).detach()
    kl = functional.kl_div(own, other, log_target=True, reduction="none").sum() / ids.numel()
    ce = functional.nll_loss(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids.numel()
    (0.7 * kl + 0.4 * ce).backward()
    for name, parameter in student.named_parameters():
        # Logits and their gradients pass through fp32.
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6 * parameter.grad.abs().max())


def test_a_distance_of_logits_with_a_factor_is_that_of_the_models(tmp_path):
    torch.manual_seed(0)
    original = stock("granite")
    student = compress(original)
    with torch.no_grad():
        loss = Distilled(student, original, kl=1.0, ce=0.0).eval()(rows(2))
        expected = original(rows(2)).logits.log_softmax(-1)
        kl = functional.kl_div(student(rows(2)).logits.log_softmax(-1), expected, log_target=True, reduction="sum")
    assert loss["kl"].item() == pytest.approx(kl.item() / rows(2).numel(), rel=1e-4)


def test_what_cannot_be_recovered_is_refused(pair, tmp_path):
    student, original = pair
    settings = recovery(**SMALL)
    arguments = (rows(), rows(4), settings, tmp_path)
    with pytest.raises(ValueError, match="not compressed"):
        recover(original, original, *arguments)
    with pytest.raises(ValueError, match="needs the uncompressed model"):
        recover(student, None, *arguments)
    with pytest.raises(ValueError, match="itself compressed"):
        recover(student, student, *arguments)
    with pytest.raises(ValueError, match="it is a qwen2"):
        recover(student, stock("qwen2"), *arguments)
    with pytest.raises(ValueError, match="vocab_size 50, not 99"):
        recover(student, stock("llama", vocab_size=50), *arguments)
    with pytest.raises(ValueError, match="several processes"):
        recover(student, original, *arguments, sharded=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": "atention"}, "did you mean 'attention'"),
        ({"tokens": 63}, "less than one step"),
        ({"batch": 3}, "must be a multiple of micro_batch"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"warmup": 1.0}, "warmup must be less than 1"),
        ({"copy_fraction": 1.5}, "a fraction of the windows"),
        ({"windows": 3}, "did you mean 'window'"),
        ({"objective": "attention"}, "objective must be 'logits' or 'text'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recovery(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("distil", "is called distill now"),
        ("near", "use --stage distill --lr 3e-4 --base-lr 3e-4"),
        ("layers", "use --stage distill --trained factors"),
        ("cp", "did you mean 'cpt'"),
    ],
)
def test_a_stage_of_an_old_or_wrong_name_is_refused_with_what_to_use(stage, message):
    with pytest.raises(ValueError, match=message):
        recovery(stage)


class Letters:
    """One token per character."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_windows_come_from_all_texts_once_and_stages_do_not_share_them(tmp_path):
    for index, name in enumerate("ab"):
        text = "".join(chr(1000 * index + n) for n in range(100, 900))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    texts = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    prose = {**SMALL, "copy_fraction": 0.0}
    first, held = windows(Letters(), texts, recovery(**prose))
    second, same = windows(Letters(), texts, recovery(**{**prose, "tokens": 4 * 64}), skip=12 * 64)
    assert torch.equal(held, same)
    seen = torch.cat([first, second, held]).flatten()
    assert len(seen.unique()) == len(seen) == (48 + 16 + 4) * WINDOW
    assert sorted(held.flatten().tolist()) == [*range(868, 900), *range(1868, 1900)]
    assert {int(row[0]) // 1000 for row in first} == {0, 1}
    again, same = windows(Letters(), texts, recovery(**SMALL))
    assert torch.equal(held, same)
    assert (again != first).any(1).sum() == len(first) // 2
    with pytest.raises(ValueError, match="give more text"):
        windows(Letters(), texts, recovery(**{**SMALL, "tokens": 100_000}))


def test_shared_runs_of_words_are_counted(tmp_path):
    words = [f"word{n}" for n in range(20)]
    (tmp_path / "trained.txt").write_text("before " + ", ".join(words[:14]).upper() + " after", encoding="utf-8")
    (tmp_path / "tested.txt").write_text("\n".join(words), encoding="utf-8")
    assert overlaps([str(tmp_path / "trained.txt")], [str(tmp_path / "tested.txt")]) == 2


@pytest.mark.parametrize("trained", ["factors", "attention", "all"])
def test_a_packed_cache_is_trained_with_its_rounding(trained, tmp_path, monkeypatch):
    """What is trained is what is read: codes of old tokens. Means stay, as encoders read what differs from them."""
    # Held-out tokens here are random, so that only the divergence says anything.
    best = property(lambda trainer: min(trainer.curve, key=lambda point: point["kl"]))
    monkeypatch.setattr(RecoveryTrainer, "best", best)
    student, original = packed(keep=0.15)
    for layer in student.model.layers:
        layer.self_attn.code.value_decoder.data *= 0.3  # a start that leaves something to learn
    ids = torch.randint(1, 256, (52, 128), generator=torch.Generator().manual_seed(0))
    changes = {"window": 128, "tokens": 12 * 4 * 128, "held_out": 4 * 128, "lr": 5e-2, "base_lr": 1e-3}
    settings = recovery(**SMALL | changes | {"trained": trained})
    before = copy.deepcopy(student)
    result = recover(student, original, ids[:48], ids[48:], settings, tmp_path / "run")
    assert result.best["kl"] < 0.99 * result.curve[0]["kl"]
    names = changed(before, result.model)
    assert any(".code." in name for name in names)
    assert not any(name.endswith("_mean") for name in names)
    if trained == "factors":
        assert all(".code." in name for name in names)
    result.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids[:1]).logits, result.model(ids[:1]).logits)


def test_the_default_precision_is_that_of_the_machine() -> None:
    """A default passes through the same checks as a given value: "fast" is no precision to train in."""
    assert recovery().precision == named_dtype("fast") == recovery(precision="fast").precision


def test_packed_caches_have_rates_of_their_own_unless_others_are_given() -> None:
    assert (recovery(packed=True).lr, recovery(packed=True).base_lr) == (1e-4, 1e-4)
    assert (recovery(packed=True, lr=1e-3).lr, recovery(packed=True, lr=None).lr) == (1e-3, 1e-4)
    assert recovery("cpt", packed=True) == recovery("cpt")
