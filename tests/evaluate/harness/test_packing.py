"""Rows with shared beginnings against every text alone, on models of several architectures; the journal of answers."""

import pytest
import torch
from torch.nn import functional

from mea.evaluate.harness.packing import Scored, batches, pack, tensors
from mea.evaluate.harness.scoring import BatchSize, Scorer
from mea.evaluate.journal import Journal

TEXTS = [
    Scored((5, 6, 7, 8, 9), (9, 3)),
    Scored((5, 6, 7, 8, 1, 2, 3), (1, 2, 3, 4)),  # the targets begin within what is shared
    Scored((5, 6, 7, 8), (4,)),  # all of it is shared
    Scored((40, 41, 42), (1,)),
    Scored((40, 41, 42), (2,)),  # the same tokens, other targets
    Scored((90,), (1,)),
]


def test_beginnings_are_shared_where_that_saves_tokens():
    rows = pack(TEXTS)
    assert [len(row.tokens) for row in rows] == [4 + 1 + 3, 3, 1]
    assert rows[0].segments == (0, 0, 0, 0, 1, 2, 2, 2)
    assert rows[0].positions == (0, 1, 2, 3, 4, 4, 5, 6)
    assert [len(row.tokens) for row in pack(TEXTS, share=False)] == [5, 7, 4, 3, 3, 1]
    for share in (True, False):  # every target is predicted at the token that stands before it, at its own position
        for row in pack(TEXTS, share):
            for index, tokens in row.targets_at:
                text = TEXTS[index]
                first = len(text.tokens) - len(text.targets)
                assert [row.tokens[token] for token in tokens] == list(text.tokens[first:])
                assert [row.positions[token] for token in tokens] == list(range(first, len(text.tokens)))


def test_what_all_items_begin_with_does_not_put_them_all_into_one_row():
    """A row of thousands of items had a mask of more memory than the machine."""
    items = [Scored((1, 2, *range(10 * i, 10 * i + 10), answer), (0,)) for i in range(1, 500) for answer in (3, 4)]
    assert max(len(row.tokens) for row in pack(items[1:])) == 14  # the first item has a single answer


def test_items_with_a_long_common_beginning_share_it_in_rows_that_stay_short():
    examples = tuple(range(1000))
    rows = pack([Scored((*examples, *range(10 * i, 10 * i + 50)), (0,)) for i in range(500)])
    assert [len(row.tokens) for row in rows] == [2000] * 25


def test_mask_shows_the_beginning_and_the_own_branch():
    _, _, mask = tensors(pack(TEXTS)[:1])
    assert mask is not None
    assert mask[0, 0, 4].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert mask[0, 0, 7].nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7]


def test_batches_fit_the_budget_and_lose_nothing():
    rows = pack([Scored(tuple(range(n)), (0,)) for n in (3, 30, 8, 9, 1, 30)], share=False)
    found = list(batches(rows, 32))
    assert sorted(len(row.tokens) for batch in found for row in batch) == [1, 3, 8, 9, 30, 30]
    assert all(len(batch) == 1 or len(batch) * len(batch[0].tokens) <= 32 for batch in found)


@torch.no_grad()
def alone(model, text):
    logits = model(input_ids=torch.tensor([text.tokens])).logits[0, -len(text.targets) :].float()
    targets = torch.tensor(text.targets)
    return -functional.cross_entropy(logits, targets, reduction="sum").item(), bool(
        (logits.argmax(-1) == targets).all()
    )


@pytest.mark.parametrize(
    ("name", "shares"),
    [("Llama", True), ("Granite", True), ("Qwen3Moe", True), ("Gemma3", False), ("GPT2", True), ("OPT", True)],
)
def test_scores_equal_those_of_each_text_alone(tiny, name, shares):
    """Gemma 3 has windows and must fall back to one text a row."""
    model = tiny(name)
    scorer = Scorer(model, batch_tokens=24)
    assert scorer.shares == shares
    results = {index: (value, greedy) for found, *_ in scorer.score(TEXTS) for index, value, greedy in found}
    assert sorted(results) == list(range(len(TEXTS)))
    for index, text in enumerate(TEXTS):
        value, greedy = alone(model, text)
        assert results[index][0] == pytest.approx(value, rel=1e-4, abs=1e-4)
        assert results[index][1] == greedy


def test_eager_attention_takes_the_same_mask(tiny):
    model = tiny("Llama")
    model.set_attn_implementation("eager")
    scorer = Scorer(model, batch_tokens=64)
    assert scorer.shares
    results = {index: value for found, *_ in scorer.score(TEXTS) for index, value, _ in found}
    assert results[1] == pytest.approx(alone(model, TEXTS[1])[0], rel=1e-4)


def test_weights_that_overflow_are_an_error(tiny):
    model = tiny("Llama")
    scorer = Scorer(model, batch_tokens=64)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        list(scorer.score(TEXTS))


def test_a_text_needs_as_many_tokens_as_targets():
    with pytest.raises(ValueError, match="3 targets cannot be predicted from 2 tokens"):
        Scored((1, 2), (1, 2, 3))


def test_batches_grow_while_that_is_faster_and_halve_when_memory_ends():
    size = BatchSize(tokens=512)
    while not size.settled:
        size.report(size.tokens, 1.0 if size.tokens <= 4096 else size.tokens / 4096)  # no faster beyond 4,096 tokens
    assert size.tokens == 4096
    size.too_large()
    assert size.tokens == 2048


def test_answers_are_found_again_unless_they_are_about_something_else(tmp_path):
    path, key = tmp_path / "a" / "task.jsonl", Journal.key("loglikelihood", ("context", " answer"))
    Journal(path, {"model": 1}).add({key: (-1.5, True), "other": "text"})
    with path.open("a") as file:
        file.write('["cut sh')  # as an interruption leaves it
    journal = Journal(path, {"model": 1})
    assert journal[key] == (-1.5, True)
    assert "cut sh" not in journal
    journal.add({"later": 1.0})
    assert Journal(path, {"model": 1})["later"] == 1.0
    assert key not in Journal(path, {"model": 2})
