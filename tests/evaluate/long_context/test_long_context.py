"""Prompts hold what is asked for where it is asked for; answers come from the cache; mistakes come first."""

import json
import re
import shutil
from dataclasses import replace
from random import Random

import pytest
import torch

from mea.evaluate import runner
from mea.evaluate.long_context import LongContext, compare, needles, recall, tracking, words
from mea.evaluate.long_context.answering import Answerer
from mea.evaluate.long_context.cells import cells_of
from mea.evaluate.long_context.plan import Asked, prompts, prompts_at
from mea.evaluate.long_context.prompts import Prompt, Query, Source, sentences
from mea.evaluate.perplexity import by_position, token_losses
from mea.evaluate.runner import evaluate
from mea.evaluate.speed import held_bytes
from mea.models.latent_attention import MODEL_TYPE_PREFIX
from mea.models.loading import load
from mea.records import read_record
from mea.text import encode_text, load_text

MAKERS = {
    "needle": lambda source, tokens, random: needles.needle(source, tokens, random, 0.5),
    "multi-key": needles.many_needles,
    "tracking": tracking.tracking,
    "common-words": words.common_words,
    "recall": recall.recall,
}


@pytest.fixture(scope="module")
def source(bytes_tokenizer):
    return Source(bytes_tokenizer)


@pytest.fixture(scope="module")
def folders(two_models):
    return two_models(512)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Few prompts from short texts: a byte tokenizer takes seconds for the packaged ones."""
    hidden, position = (tmp_path_factory.mktemp("texts") / "text.txt" for _ in range(2))
    hidden.write_text(load_text("wikitext-2-valid")[:100_000], encoding="utf-8")
    position.write_text(load_text("wikitext-2-test")[:4000], encoding="utf-8")
    tasks = ("needle", "recall", "position")
    return LongContext(tasks, (256, 320), limit=2, text=str(hidden), position_text=str(position))


@pytest.fixture(scope="module")
def compared(folders, plan, tmp_path_factory):
    """Both models evaluated in one run: its folder, its records, and what was reported."""
    out, seen, said = tmp_path_factory.mktemp("compared"), [], []
    records = evaluate(
        str(folders / "first"),
        plan,
        out,
        against=str(folders / "second"),
        progress=lambda *told: seen.append(told),
        say=said.append,
    )
    return out, records, seen, said


@pytest.fixture
def unloaded(monkeypatch):
    """Weights must not be read."""
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("tokens", [1024, 3000])
def test_prompts_fill_their_length_and_not_more(source, task, tokens):
    prompt = MAKERS[task](source, tokens, Random(1))
    whole = source.count(prompt.context) + source.reserve(prompt.queries)
    assert tokens - 500 < whole <= tokens
    assert MAKERS[task](source, tokens, Random(1)) == prompt
    assert MAKERS[task](source, tokens, Random(2)) != prompt
    for query in prompt.queries:
        assert not set(query.right) & set(query.wrong)
        assert len(set(query.candidates)) == len(query.candidates)
        assert all(word in prompt.context for word in query.right)


@pytest.mark.parametrize("depth", needles.DEPTHS)
def test_a_needle_lies_at_its_depth(source, depth):
    prompt = needles.needle(source, 4000, Random(0), depth)
    place = prompt.context.index("The password of the") / len(prompt.context)
    assert place == pytest.approx(depth, abs=0.06)
    (query,) = prompt.queries
    asked = re.search(r"password of the (\w+) is$", query.ask).group(1)
    assert f"The password of the {asked} is {query.right[0]}." in prompt.context


def test_needles_of_one_form_ask_for_one_another(source):
    prompt = needles.many_needles(source, 4000, Random(0))
    assert len(prompt.queries) == needles.KEYS
    for query in prompt.queries:
        assert all(f" is {word}." in prompt.context for word in query.candidates)
        place = prompt.context.index(f" is {query.right[0]}.") / len(prompt.context)
        assert place == pytest.approx(query.depth, abs=0.08)


def test_a_variable_is_followed_to_its_word(source):
    """The answers are those of an interpreter of the text."""
    prompt = tracking.tracking(source, 3000, Random(0))
    values = {}
    for name, value in re.findall(r"Variable (\w) is set to (variable \w|\w+)\.", prompt.context):
        values[name] = values[value[-1]] if value.startswith("variable ") else value
    assert len(values) == tracking.CHAINS * (tracking.HOPS + 1)
    for query in prompt.queries:
        assert values[re.search(r"variable (\w) stands", query.ask).group(1)] == query.right[0]


def test_common_words_are_the_commonest(source):
    prompt = words.common_words(source, 3000, Random(0))
    listed = re.findall(r"\w+", prompt.context)[1:]
    (query,) = prompt.queries
    counts = {word: listed.count(word) for word in query.candidates}
    assert {counts[word] for word in query.right} == {words.OFTEN}
    assert {counts[word] for word in query.wrong} == {words.RARELY}


def test_recall_asks_for_pairs_of_the_text(source):
    prompt = recall.recall(source, 1024, Random(0))
    pairs = dict(re.findall(r"(\w+): (\w+)\n", prompt.context))
    assert len(prompt.queries) == recall.QUERIES
    for query in prompt.queries:
        assert pairs[query.ask.removesuffix(":")] == query.right[0]
        assert set(query.wrong) <= set(pairs.values())


def test_sentences_of_wikitext():
    text = " = Title = \nIt was , as he said ( in 1 @,@ 900 ) , the king 's own house . The other one stood empty . \n"
    assert sentences(text) == [
        "It was, as he said (in 1,900), the king's own house.",
        "The other one stood empty.",
    ]


@pytest.mark.parametrize("bits", [None, 8])
def test_answers_are_those_of_whole_texts_read_without_a_cache(tiny, source, bits):
    """Questions on copies of one cache; answers of several tokens, padded in one batch; some copies at a time."""
    model = tiny("Llama", vocab_size=258).double()
    queries = (Query("\nWhat", ("ten", "a"), ("fourteen", "no")), Query("\nWho then", ("we",), ("someone",)))
    prompt = Prompt("It was said that ten would come, and a king.", queries)
    answers, tokens, held = Answerer(model, source, bits).answer(prompt)
    assert tokens == source.count(prompt.context)
    assert held == tokens * 2 * 2 * 2 * 8 * 8 or bits  # layers, keys and values, heads, width, bytes
    for query, answer in zip(queries, answers, strict=True):
        values = []
        for word in query.candidates:
            ids, n = source.ids(prompt.context + query.ask + f" {word}"), len(source.answer(word))
            logits = model(torch.tensor([ids[:-1]])).logits[0, -n:].log_softmax(-1)
            values.append(sum(logits[i, token].item() for i, token in enumerate(ids[-n:])))
        right = torch.tensor(values[: len(query.right)])
        assert answer.logprob == pytest.approx(right.logsumexp(0).item(), rel=1e-5)
        assert answer.choice == float(max(right) > max(values[len(query.right) :]))
        ids = source.ids(prompt.context + query.ask)
        for _ in range(source.new_tokens(query)):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.written == source.tokenizer.decode(ids[-source.new_tokens(query) :])


def test_answers_come_from_the_quantised_cache(tiny, source):
    model = tiny("Llama", vocab_size=258)
    prompt = needles.needle(source, 500, Random(0), 0.0)
    (whole,), _, bytes_ = Answerer(model, source).answer(prompt)
    (coarse,), _, fewer = Answerer(model, source, 2).answer(prompt)
    assert fewer < bytes_ / 3
    assert coarse.logprob != whole.logprob


def test_cells_hold_means_over_prompts():
    queries = (Query("a", ("x",), ("y",), 0.5), Query("b", ("x",), ("y",), 0.5))
    asked = [Asked("multi-key", 64, i, None, Prompt("t", queries)) for i in range(2)]
    answers = [[1.0, 0.0], [1.0, 1.0]]
    samples = [
        {
            "context": 60 + i,
            "cache_bytes": 100,
            "answers": [{"exact": 0.0, "choice": x, "logprob": -1.0} for x in values],
        }
        for i, values in enumerate(answers)
    ]
    (cell,) = cells_of(asked, samples)
    assert (cell["items"], cell["questions"], cell["chance"], cell["context"]) == (2, 4, 0.5, 60.5)
    assert cell["choice"] == {"mean": 0.75, "standard_error": pytest.approx(0.25)}


def test_two_models_prompt_by_prompt(compared):
    out, (first, second, paired), seen, said = compared
    assert [record["kind"] for record in (first, second, paired)] == ["long context"] * 2 + ["paired long context"]
    assert [line.split(":")[0] for line in said] == ["first", "second"]
    assert "24 prompts" in said[0]
    assert [done for what, done, of in seen if what.startswith("first")][-1] == 100
    cells = first["results"]["cells"]
    assert {cell["task"] for cell in cells} == {"needle", "recall"}
    assert all(cell["cache_bytes"] == cell["context"] * 2 * 2 * 2 * 8 * 4 for cell in cells)
    for found in paired["results"]["lengths"]:
        mine, theirs = (one["samples"][found["task"]][str(found["tokens"])] for one in (first, second))
        gaps = [a - b for a, b in zip(mine[found["score"]], theirs[found["score"]], strict=True)]
        assert found["difference"] == pytest.approx(sum(gaps) / len(gaps))
    assert read_record(out / "paired-first-second-long-context.json") == paired
    lines = (out / "samples" / "second-long-context.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * 2 * 5 + 2 * 2 * recall.QUERIES
    assert {"task", "tokens", "number", "ask", "right", "wrong", "written", "logprob"} <= set(json.loads(lines[0]))


def test_loss_by_position_is_that_of_perplexity(folders, compared, source):
    record = compared[1][0]
    model, _ = load(str(folders / "first"))
    tokens = encode_text(source.tokenizer, load_text("wikitext-2-test")[:4000], 640)
    expected = by_position(token_losses(model, tokens, 320), (0, 256, 320))
    for found, range_ in zip(record["results"]["positions"], expected, strict=True):
        assert (found["start"], found["stop"]) == (range_.start, range_.stop)
        assert found["perplexity"] == pytest.approx(range_.estimate.value)


def test_answers_are_not_asked_for_twice(folders, compared, plan, tmp_path, monkeypatch):
    """The first run is interrupted; the second asks for the rest, the third for nothing."""
    asked = []
    whole = Answerer.answer
    monkeypatch.setattr(Answerer, "answer", lambda self, prompt: asked.append(prompt) or whole(self, prompt))

    def interrupt(what, done, of):
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(str(folders / "first"), plan, tmp_path, progress=interrupt)
    before = len(asked)
    assert 0 < before < 24
    (complete,) = evaluate(str(folders / "first"), plan, tmp_path)
    assert len(asked) == 24
    assert complete["results"]["answers_kept_from_before"] == before
    assert evaluate(str(folders / "first"), plan, tmp_path) == [complete]
    afresh = compared[1][0]
    assert afresh["samples"] == complete["samples"]


def test_half_the_cache_is_half_the_bytes(tiny, source):
    from tiny_models import compress, stock

    torch.manual_seed(0)
    model = stock("llama", vocab_size=258, max_position_embeddings=1024)
    small = compress(model, ((12, 12),) * 3)
    assert small.config.model_type.startswith(MODEL_TYPE_PREFIX)
    prompt = needles.needle(source, 400, Random(0), 1.0)
    _, tokens, whole = Answerer(model, source).answer(prompt)
    _, _, half = Answerer(small, source).answer(prompt)
    assert (whole, half) == (tokens * 3 * 48 * 4, tokens * 3 * 24 * 4)


def test_other_prompts_are_not_compared(folders, plan, tmp_path):
    records = [
        evaluate(str(folders / "first"), replace(plan, tasks=("recall",), seed=seed), tmp_path / str(seed))[0]
        for seed in (0, 1)
    ]
    with pytest.raises(ValueError, match="not asked the same: prompts differ"):
        compare(*records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("needel",)}, "did you mean 'needle'"),
        ({"lengths": (256, 1024)}, "1,024 tokens are longer than the model's context of 512"),
        ({"lengths": (0,)}, "positive numbers of tokens"),
        ({"lengths": (256, 256)}, "none twice"),
        ({"tasks": ("needle",), "lengths": (64,)}, "needle does not fit into"),
        ({"tasks": ("common-words",), "lengths": (128,)}, "common-words does not fit"),
        ({"tasks": ("recall",), "lengths": (64,)}, "recall does not fit"),
        ({"limit": 0}, "must be positive, not 0"),
        ({"cache_bits": 5}, "in 2, 3, 4, 8 bits, not in 5"),
        ({"text": "wikitext-2-valif"}, "did you mean 'wikitext-2-valid'"),
        ({"dtype": "float8"}, "dtype is one of"),
    ],
)
def test_mistakes_are_found_before_weights_are_loaded(folders, tmp_path, unloaded, plan, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(str(folders / "first"), replace(plan, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(folders, plan, tmp_path, unloaded):
    shutil.copytree(folders / "first", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="tokens up to 257, its model 100 in all"):
        evaluate(str(tmp_path / "model"), plan, tmp_path)


def test_longer_prompts_are_fewer(source):
    assert [prompts_at(tokens) for tokens in (512, 1024, 2048, 4096, 8192)] == [8, 8, 6, 3, 2]
    found = prompts(source, ("needle", "recall", "position"), (1024, 2048))
    assert [(one.task, one.tokens) for one in found] == [("needle", 1024)] * 40 + [("recall", 1024)] * 8 + [
        ("needle", 2048)
    ] * 30


def test_held_bytes_of_an_empty_cache():
    from transformers import DynamicCache

    assert sum(held_bytes(DynamicCache())) == 0
