"""Settings are read strictly: what is wrong is said before any work, with the nearest thing that is right."""

import pytest

from mea.train.pretraining.settings import read_settings, settings_from

GOOD = {"data": {"files": ["a.txt"]}}


def test_a_file_holds_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\nfiles = "a.txt"\n[optim]\nlearning_rate = 1\n[run]\nreport_to = ["tensorboard"]\n')
    settings = read_settings(path)
    assert settings.data.files == ("a.txt",)
    assert settings.optim.learning_rate == 1.0
    assert settings.run.report_to == ("tensorboard",)
    assert settings.model.variant == "mea"
    assert settings.optim.steps == 3_000_000 // 2048


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"\[settings\] lacks data"),
        ({"data": {}}, "give either files or hub"),
        ({"data": {"files": ["a.txt"], "hub": "x"}}, "give either files or hub"),
        ({**GOOD, "optimizer": {}}, "there is no 'optimizer'.*did you mean 'optim'"),
        ({**GOOD, "optim": {"lr": 1.0}}, r"\[optim\] has no 'lr'; known are learning_rate"),
        ({**GOOD, "optim": {"learning_rate": "fast"}}, "optim.learning_rate must be a valid number, not 'fast'"),
        ({**GOOD, "optim": {"learning_rate": float("nan")}}, "optim.learning_rate must be a finite number, not nan"),
        ({**GOOD, "optim": {"learning_rate": 0}}, "optim.learning_rate must be greater than 0, not 0"),
        ({**GOOD, "optim": {"schedule": "cosin"}}, "optim.schedule must be .* did you mean 'cosine'"),
        ({**GOOD, "optim": {"batch_tokens": 1000}}, "must be a multiple of data.row"),
        ({**GOOD, "optim": {"tokens": 100}}, "fewer than one batch"),
        ({**GOOD, "run": {"seed": True}}, "run.seed must be a valid integer, not True"),
        ({**GOOD, "run": {"fold_at": 2}}, "run.fold_at must be less than 1, not 2"),
        ({**GOOD, "run": {"fold_at": 0.5, "shard": True}}, "does not go with run.shard"),
        ({**GOOD, "run": []}, r"\[run\] must be a table"),
        ({**GOOD, "model": {"variant": "mae"}}, "no variant is called 'mae'.*[Dd]id you mean 'mea'"),
        (
            {"data": {"files": ["a.txt"], "vocabulary": 100}},
            "data.vocabulary must be greater than or equal to 257, not 100",
        ),
    ],
)
def test_what_is_wrong_is_said(tables, message):
    with pytest.raises(ValueError, match=message):
        settings_from(tables)


def test_a_file_that_is_not_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("data = [")
    with pytest.raises(ValueError, match=r"run.toml is not TOML"):
        read_settings(path)
