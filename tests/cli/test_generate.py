"""``mea generate`` continues a prompt as the model's own generate does, for one model or two."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mea.evaluate.generation import continue_prompt


@pytest.fixture
def loaded(models_):
    return AutoModelForCausalLM.from_pretrained(models_["a"]), AutoTokenizer.from_pretrained(models_["a"])


def greedy(model, ids, count):
    """Without a cache, token by token."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_continuation(mea, models_, loaded):
    model, tokenizer = loaded
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, 6)[0, 3:], skip_special_tokens=True)
    result = mea("generate", models_["a"], "--prompt", "w1 w2 w3", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == expected.split()


def test_two_models_side_by_side(mea, models_):
    result = mea("generate", models_["a"], "--prompt", "w1", "--max-new-tokens", 3, "--against", models_["b"])
    assert [line[4:] for line in result.stdout.splitlines() if line.startswith("---")] == ["a", "b"]


def test_streamed_pieces_make_up_the_whole(loaded):
    pieces = []
    text = continue_prompt(*loaded, "w5 w9", max_new_tokens=8, temperature=1.5, stream=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == text.strip()


def test_draws_follow_the_seed(loaded):
    first, again, other = (
        continue_prompt(*loaded, "w5", max_new_tokens=20, temperature=2.0, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "w1", "--max-new-tokens", "256"), "exceed the model's context of 256"),
        (("--prompt", "w1", "--temperature", "-1"), "temperature not negative"),
        (("--prompt", "w1", "--chat"), "no chat template"),
    ],
)
def test_mistakes_are_one_line(mea, models_, options, message):
    result = mea("generate", models_["a"], *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_over_a_quantised_cache(mea, models_):
    """A short text lies in the tokens that are stored as they are: the continuation is the same."""
    options = ("--prompt", "w1 w2 w3", "--max-new-tokens", 6)
    plain, stored = (mea("generate", models_["a"], *options, *more) for more in ((), ("--cache-bits", 4)))
    assert stored.exit_code == 0, stored.output
    assert stored.stdout == plain.stdout


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('only for two') }}", "only for two"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[5].content.nothing }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10**12)|list }}", "OverflowError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(loaded, template, error):
    model, tokenizer = loaded
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"chat template fails .*{error}.*: continue text without it"):
        continue_prompt(model, tokenizer, "w1", chat=True)


def test_a_chat_template_is_used(loaded):
    model, tokenizer = loaded
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }}{% endfor %}"
    plain = continue_prompt(model, tokenizer, "w9 w1", max_new_tokens=5)
    assert continue_prompt(model, tokenizer, "w1", max_new_tokens=5, chat=True) == plain
