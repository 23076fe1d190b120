"""Models that pack their cache: size, time, losses and answers, and no bits on top of theirs."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from compression.small import packed, planned, tiny
from mea.compression import Calibration
from mea.compression.budget import CacheShape
from mea.evaluate import perplexity_record, runner
from mea.evaluate.harness.packing import Scored
from mea.evaluate.harness.scoring import Scorer
from mea.evaluate.long_context import LongContext, needles
from mea.evaluate.long_context.answering import Answerer
from mea.evaluate.long_context.prompts import Source
from mea.evaluate.perplexity import by_position, token_losses
from mea.evaluate.speed import cache_size, decode_seconds
from mea.evaluate.through_cache import Continuation
from mea.models.packed_cache import PackedLayer
from mea.models.quantized_cache import QuantisedCache
from mea.text import load_text

METHODS = ("predictive", "joint")


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return packed(request.param, keep=0.15, vocab_size=258)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Any) -> Path:
    """A saved model with a packed cache, and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "packed"
    packed(keep=0.15, vocab_size=258)[0].save_pretrained(path)
    bytes_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_of_a_long_cache_are_those_of_one_that_was_read(method: str, kind: str) -> None:
    model, original = packed(method, kind)
    ids = torch.arange(700)[None] * 31 % 256
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    held = tuple(sum(tensor.nbytes for tensor in layer.stored()) for layer in cache.layers)
    assert cache_size(model, 700).layer_bytes == held
    assert cache_size(original, 700).bytes == CacheShape.of(original.config, 4).bytes(700)


def test_at_its_context_a_cache_is_within_its_budget(pair: tuple[Any, Any]) -> None:
    model, original = pair
    plan = planned(original.config, method="predictive", keep=0.15, calibration=Calibration(tokens=1024, window=128))
    assert cache_size(model, 8192).bytes <= plan.layout.bytes(plan.shape, 8192)


def test_layers_left_alone_are_measured_too() -> None:
    model, _ = packed(layout="deep", num_hidden_layers=5)
    sizes = cache_size(model, 1000).layer_bytes
    assert sizes[:3] == (1000 * 64 * 4,) * 3
    assert all(size < sizes[0] / 2 for size in sizes[3:])


def test_decoding_takes_turns_with_the_original(pair: tuple[Any, Any]) -> None:
    lengths = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs["past_key_values"]
        lengths.append((type(cache.layers[0]), int(cache.get_seq_length())))

    handle = pair[0].register_forward_pre_hook(note, with_kwargs=True)
    samples = decode_seconds({"packed": pair[0], "original": pair[1]}, 600, steps=3, warmup=1)
    handle.remove()
    assert {name: len(seconds) for name, seconds in samples.items()} == {"packed": 3, "original": 3}
    assert lengths == [(PackedLayer, 600 + step) for step in range(4)]


def test_losses_of_a_pass_are_those_over_the_cache(pair: tuple[Any, Any]) -> None:
    """A pass without a cache reads old tokens by their codes as well."""
    tokens = torch.randint(0, 258, (400,))
    whole = token_losses(pair[0], tokens, 200)
    continued = token_losses(pair[0], tokens, 200, read=Continuation(130))
    # A code may fall on the other side of an edge, as sums differ in their last digit.
    assert (continued - whole[:, 130:]).abs().median() < 1e-5
    plain = token_losses(pair[1], tokens, 200)
    early, late = (x.estimate.value for x in by_position(whole, (0, 64, 200), plain))
    assert early == pytest.approx(1, abs=1e-6)  # everything is read exactly
    assert late != pytest.approx(1, abs=1e-6)


def test_continuations_of_tasks_are_scored_one_by_one(pair: tuple[Any, Any]) -> None:
    """In a row with branches a token's place is not its position, and places decide which tokens are exact."""
    begin = tuple(range(3, 120))
    texts = [Scored((*begin, i), (7, i)) for i in (1, 2)]
    scorer = Scorer(pair[0], 512)
    assert not scorer.shares
    found = {index: value for results, *_ in scorer.score(texts) for index, value, _ in results}
    for index, text in enumerate(texts):
        with torch.no_grad():
            logs = pair[0](torch.tensor([text.tokens])).logits[0].log_softmax(-1)
        expected = sum(logs[at, token].item() for at, token in zip((-2, -1), text.targets, strict=True))
        assert found[index] == pytest.approx(expected, abs=1e-4)
    assert Scorer(pair[1], 512).shares


def test_questions_are_answered_over_the_packed_cache(pair: tuple[Any, Any], bytes_tokenizer: Any) -> None:
    source = Source(bytes_tokenizer)
    prompt = needles.many_needles(source, 900, Random(0))
    assert len(prompt.queries) > 1  # copies of the cache are read
    answers, tokens, held = Answerer(pair[0], source).answer(prompt)
    assert held == cache_size(pair[0], tokens).bytes
    others, *_ = Answerer(pair[1], source).answer(prompt)
    for own, other in zip(answers, others, strict=True):
        assert own.logprob == pytest.approx(other.logprob, rel=0.2)


def test_long_contexts_and_perplexity_from_the_folder(folder: Path, tmp_path: Path) -> None:
    hidden, position = (tmp_path / name for name in ("hidden.txt", "position.txt"))
    hidden.write_text(load_text("wikitext-2-valid")[:60_000], encoding="utf-8")
    position.write_text(load_text("wikitext-2-test")[:2000], encoding="utf-8")
    plan = LongContext(("needle", "position"), (256,), limit=1, text=str(hidden), position_text=str(position))
    (record,) = runner.evaluate(str(folder), plan, tmp_path / "out")
    assert record["results"]["positions"]
    assert all(cell["cache_bytes"] > 0 for cell in record["results"]["cells"])
    measured = perplexity_record.perplexity_record(str(folder), text=str(position), window=128, tokens=512)
    assert measured["results"]["perplexity"] > 1


def test_bits_on_top_of_codes_are_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (perplexity_record, runner):
        monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    message = "compressed already, .* leave out cache bits"
    with pytest.raises(ValueError, match=message):
        perplexity_record.perplexity_record(str(folder), cache_bits=4)
    with pytest.raises(ValueError, match=message):
        runner.evaluate(str(folder), replace(LongContext(("needle",), (256,)), cache_bits=4), tmp_path / "out")
    model, _ = packed(keep=0.15)
    with pytest.raises(ValueError, match=message):
        QuantisedCache(model.config, 4)
    QuantisedCache(tiny().config, 4)
