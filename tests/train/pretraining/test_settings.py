"""Settings are read strictly: what is wrong is said before any work, with the nearest thing that is right."""

from datetime import date

import pytest

from mea.train.pretraining.settings import read_settings, settings_from

GOOD = {"data": {"files": ["a.txt"]}}


def changes(variant="mea", **fields):
    return {**GOOD, "model": {"variant": variant, "changes": fields}}


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
        ({**GOOD, "run": {"fold_at": 0.5, "shard": True}}, "which run.shard splits"),
        ({**GOOD, "run": []}, r"\[run\] must be a table"),
        ({**GOOD, "run": {"seed": -1}}, "run.seed must be greater than or equal to 0, not -1"),
        ({**GOOD, "run": {"micro_batch_rows": 0}}, "run.micro_batch_rows must be greater than or equal to 1, not 0"),
        (
            {**GOOD, "optim": {"warmup_tokens": 3_002_368}},
            "warm-up of 1,466 steps is longer than the run of 1,464 steps",
        ),
        (
            {**GOOD, "optim": {"schedule": "wsd", "warmup_tokens": 2_500_000}},
            "warm-up of 1,220 steps and a decay of 293 is longer than the run",
        ),
        ({**GOOD, "labels": {"day": date(2026, 1, 1)}}, "labels.day: input was not a valid JSON value"),
        ({"data": {"files": "a.txt", "separator": ""}}, "data.separator: String should have at least 1 character"),
        (changes(hidden_size=0), "model.changes.hidden_size must be greater than or equal to 1, not 0"),
        (changes(hidden_size="wide"), "model.changes.hidden_size must be a valid integer, not 'wide'"),
        (changes(hiden_size=64), r"\[model.changes\] has no 'hiden_size'.*did you mean 'hidden_size'"),
        (changes(vocab_size=64), r"\[model.changes\] has no 'vocab_size'"),
        (changes(num_hidden_layers=-1), "model.changes.num_hidden_layers must be greater than or equal to 1, not -1"),
        (changes(num_attention_heads=7), r"\[model\]: num_kv_heads \(4\) must divide num_heads \(7\)"),
        (changes(head_dim=7), r"\[model\]"),
        (changes(hidden_act="step"), r"\[model\] .* cannot be built: KeyError: 'step'"),
        (changes(rope_parameters={"rope_theta": "far"}), r"\[model\]: could not convert .* 'far'"),
        (changes(intermediate_size=8, variant="differential_v2"), r"\[model\] .* cannot be built"),
        ({**GOOD, "model": {"attention_options": {"norm": 1}}}, r"\[model\]: attention_options .* do not suit 'mea'"),
        ({**GOOD, "model": {"variant": "meaa"}}, "no variant is called 'meaa'.*[Dd]id you mean 'mea'"),
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
