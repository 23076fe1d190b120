"""``mea eval`` from the command line: tables, files, and mistakes as one line."""

from pathlib import Path

import pytest

from mea.records import read_record

DATA = Path(__file__).parents[1] / "evaluate" / "data"


def test_two_models_item_by_item(mea, models_, tmp_path):
    options = ("--task", "piqa", "--data", DATA, "--limit", 4, "--out", tmp_path)
    result = mea("eval", models_["a"], "--against", models_["b"], *options)
    assert result.exit_code == 0, result.stderr
    assert "McNemar" in result.stdout
    assert read_record(tmp_path / "a-piqa.json")["results"]["items"] == 4
    paired = read_record(tmp_path / "paired-a-b.json")
    assert paired["results"]["tasks"]["piqa"]["acc"]["items"] == 4
    assert (tmp_path / "samples" / "b-piqa.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "zero-shit"), "did you mean 'zero-shot'"),
        (("--task", "hellaswg"), "did you mean 'hellaswag'"),
        ((), "nothing to evaluate"),
        (("--suite", "long-contxt"), "did you mean 'long-context'"),
        (("--suite", "long-context", "--lengths", "512"), "longer than the model's context of 256"),
        (("--suite", "long-context", "--lengths", "short"), "such as 512,1024, not 'short'"),
        (("--suite", "long-context", "--task", "needel"), "did you mean 'needle'"),
        (("--suite", "long-context", "--data", "x"), "--data is no option of the suite long-context"),
        (("--suite", "zero-shot", "--lengths", "512"), "--lengths is an option of --suite long-context only"),
        (("--suite", "zero-shot", "--data", "nowhere"), "no data folder at nowhere"),
        (("--suite", "zero-shot", "--limit", "0"), "must be positive, not 0"),
    ],
)
def test_mistakes_are_one_line(mea, models_, tmp_path, options, message):
    result = mea("eval", models_["a"], "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_long_contexts_of_one_model_in_two_caches(mea, models_, tmp_path):
    """The same model against itself with 2 bits, under two names."""
    options = ("--suite", "long-context", "--task", "needle", "--task", "position", "--lengths", "200", "--limit", 1)
    result = mea("eval", models_["a"], "--against", models_["a"], "--cache-bits", 2, "--out", tmp_path, *options)
    assert result.exit_code == 0, result.stderr
    assert "a against a-2" in result.stdout
    first, second = (read_record(tmp_path / f"{name}-long-context.json") for name in ("a", "a-2"))
    assert (first["config"]["cache_bits"], second["config"]["cache_bits"]) == (2, None)
    assert first["config"]["weights"] == second["config"]["weights"]
    assert first["results"]["cells"][0]["cache_bytes"] < second["results"]["cells"][0]["cache_bytes"]
    assert "5 prompts of 1,000 tokens" in result.stderr
