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
        (("--suite", "zero-shit"), "did you mean zero-shot"),
        (("--task", "hellaswg"), "did you mean hellaswag"),
        ((), "nothing to evaluate"),
        (("--suite", "zero-shot", "--data", "nowhere"), "no data folder at nowhere"),
        (("--suite", "zero-shot", "--limit", "0"), "must be positive, not 0"),
    ],
)
def test_mistakes_are_one_line(mea, models_, tmp_path, options, message):
    result = mea("eval", models_["a"], "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
