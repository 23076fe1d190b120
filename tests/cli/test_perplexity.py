"""``mea perplexity`` prints what the library computes, writes it down, and answers mistakes with one line."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mea.evaluate import perplexity_record
from mea.evaluate.perplexity import perplexity, ratio, token_losses
from mea.records import read_record
from mea.report.sections.comparison_rows import with_error
from mea.text import encode_text, load_text


def losses(folder, text, window):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return token_losses(model, encode_text(tokenizer, load_text(text)), window)


def test_prints_and_records_the_ratio(mea, models_, text, tmp_path):
    out = tmp_path / "records" / "r.json"
    options = ("--text", text, "--window", 64, "--against", models_["b"], "--record", out)
    result = mea("perplexity", models_["a"], *options)
    assert result.exit_code == 0, result.output
    record = read_record(out)
    a, b = losses(models_["a"], text, 64), losses(models_["b"], text, 64)
    assert record["results"]["perplexity"] == pytest.approx(perplexity(a).value, rel=1e-6)
    assert record["results"]["ratio"] == pytest.approx(ratio(a, b).value, rel=1e-6)
    assert record["results"]["scored_tokens"] == 4 * 63
    assert len(record["samples"]["block_losses"]) == 4
    assert (record["config"]["model"], record["config"]["text"]) == ("a", "text.txt")
    assert str(tmp_path) not in out.read_text()
    assert with_error(perplexity(a).value, perplexity(a).standard_error) in result.stdout
    assert "252 tokens scored" in result.stdout
    assert "perplexity of" in result.stderr
    assert "perplexity of" not in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "wikitext-2-tets"), "did you mean 'wikitext-2-test'"),
        (("--text", "gone.txt"), "there is no text file gone.txt"),
        (("--window", "300"), "longer than the model's context of 256"),
        (("--tokens", "9999"), "the text has 300 tokens, not the 9,999 asked for"),
        (("--tokens", "30"), "fewer than one window of 64"),
        (("--dtype", "int3"), "not 'int3'"),
    ],
)
def test_mistakes_are_one_line(mea, models_, text, options, message):
    given = dict(zip(options[::2], options[1::2], strict=True))
    settings = {"--text": text, "--window": "64"} | given
    result = mea("perplexity", models_["a"], *(part for pair in settings.items() for part in pair))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_models_of_different_tokens_are_refused_before_any_is_loaded(mea, models_, text, monkeypatch):
    monkeypatch.setattr(perplexity_record, "load", None)
    result = mea("perplexity", models_["a"], "--text", text, "--window", 64, "--against", models_["other"])
    assert result.exit_code == 2
    assert "read the text as different tokens" in result.stderr


def test_no_such_model(mea, tmp_path):
    result = mea("perplexity", tmp_path / "none")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_defects_of_the_program_are_not_hidden(mea, models_, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a defect")

    monkeypatch.setattr("mea.evaluate.perplexity_record.perplexity_record", broken)
    assert isinstance(mea("perplexity", models_["a"]).exception, KeyError)


def test_through_a_quantised_cache(mea, models_, text, tmp_path):
    """The more bits, the nearer to the model itself; the record says how many."""
    ratios = []
    for bits in (8, 2):
        out = tmp_path / f"{bits}.json"
        options = ("--text", text, "--window", 100, "--against", models_["a"], "--cache-bits", bits, "--record", out)
        result = mea("perplexity", models_["a"], *options)
        assert result.exit_code == 0, result.output
        record = read_record(out)
        assert record["config"]["cache_bits"] == bits
        ratios.append(abs(record["results"]["ratio"] - 1))
    assert 0 < ratios[0] < ratios[1]
    wrong = mea("perplexity", models_["a"], "--text", text, "--cache-bits", 5)
    assert wrong.exit_code == 2
    assert "2, 3, 4, 8 bits, not in 5" in wrong.stderr
