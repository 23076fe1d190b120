"""``--help``, the examples in it, and what is said about names that do not exist."""

import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
import typing

import pytest
import typer
from typer.testing import CliRunner

from mea import names
from mea.cli import COMMANDS, app, compare, console
from mea.cli.command import RENAMED
from mea.comparison import configs
from mea.compression import Calibration
from mea.compression.budget import PRESETS
from mea.compression.methods import METHODS
from mea.compression.options import CompressOptions
from mea.evaluate.suites import LONG_CONTEXT, SUITES
from mea.models.quantized_cache import BITS
from mea.train.recovery import settings
from mea.train.recovery.settings import recovery

FUNCTIONS = {name: entry for commands in COMMANDS.values() for name, entry in commands.items()}
TYPER = typer.main.get_command(app)
HEAVY = {"torch", "transformers", "numpy", "scipy", "matplotlib", "datasets", "accelerate", "jinja2", "lm_eval"}


def parameters(command: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(FUNCTIONS[command][0]).parameters)


def shown(command: str) -> str:
    """The help without its lines and breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", CliRunner().invoke(app, [command, "--help"]).stdout).split())


@pytest.mark.parametrize("command", FUNCTIONS)
def test_all_words_of_the_help_are_printed(command):
    """Square brackets are markup, which disappears, unless they are escaped."""
    printed = shown(command).replace(" ", "")
    for parameter in TYPER.commands[command].params:
        if help_text := getattr(parameter, "help", None):
            assert help_text.replace("\\[", "[").replace(" ", "") in printed


def test_names_in_the_help_are_those_of_the_registries():
    assert list(names.METHODS) == list(dict.fromkeys(method.name for method in METHODS.values()))
    assert [name for name, method in METHODS.items() if method.coded] == list(names.CODED_METHODS)
    assert all(METHODS[name].whole_heads for name in names.WHOLE_HEAD_METHODS)
    assert (*names.CODED_METHODS, *names.WHOLE_HEAD_METHODS, *names.BASELINES) == tuple(names.METHODS)
    assert (compare.CODED_KEEPS, compare.RANKED_KEEPS) == (configs.CODED_KEEPS, configs.RANKED_KEEPS)
    assert names.LAYOUTS == PRESETS
    assert names.CACHE_BITS == BITS
    assert (*SUITES, LONG_CONTEXT) == names.SUITES
    assert set(names.STAGES) == set(settings.STAGES)
    assert inspect.signature(recovery).parameters["stage"].default == names.DEFAULT_STAGE
    assert settings.Trained.__args__ == names.TRAINED


def test_defaults_in_the_help_are_those_of_the_package():
    calibration = Calibration()
    for command in ("compress", "profile", "compare"):
        for name in ("text", "tokens", "window"):
            if parameter := parameters(command).get(f"calibration_{name}"):
                assert parameter.default == getattr(calibration, name), (command, name)
        assert parameters(command)["copy_fraction"].default == calibration.copy_fraction
    for field in dataclasses.fields(CompressOptions):
        assert field.name == "calibration" or parameters("compress")[field.name].default == field.default
    assert f"to keep; {names.DEFAULT_CODED_KEEP:g} by default, {names.DEFAULT_KEEP:g} with" in shown("compress")
    stage = recovery()
    for default in (f"stage; {stage.tokens:,} by", f"window; {stage.window} by", f"step; {stage.batch} by"):
        assert default in shown("recover")


@pytest.mark.parametrize("command", ["", *FUNCTIONS])
def test_help_fits_and_shows_two_examples_that_parse(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    if command:
        examples = FUNCTIONS[command][1]
        assert len(examples) == 2
        for example in examples:
            assert example in result.stdout, "an example fits on one line"
            program, name, *arguments = shlex.split(example)
            assert (program, name) == ("mea", command)
            TYPER.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    else:
        assert all(re.search(rf"│ {name} +[A-Z]", result.stdout) for name in FUNCTIONS)


def test_the_same_word_means_the_same():
    """An option has one type in all commands, be it given once or several times, and old names are nowhere used."""
    kinds: dict[str, set[str]] = {}
    for command in FUNCTIONS:
        for name, annotation in typing.get_type_hints(FUNCTIONS[command][0]).items():
            kind = re.sub(r"list\[(.*)\]", r"\1", str(annotation).removesuffix(" | None"))
            kinds.setdefault(name, set()).add(kind.removeprefix("<class '").removesuffix("'>"))
    assert {name: types for name, types in kinds.items() if len(types) > 1} == {}
    assert not kinds.keys() & {"json", "reread", "rate", "odd"}


@pytest.mark.parametrize(("command", "old"), [(command, old) for command, olds in RENAMED.items() for old in olds])
def test_old_option_names_are_answered_with_the_new_ones(command, old):
    result = CliRunner().invoke(app, [command, "a", old, "1"], env={"COLUMNS": "80"})
    assert result.exit_code == 2
    new = RENAMED[command][old]
    assert f"{old} was renamed: give {new}" in " ".join(result.stderr.replace("│", " ").split())
    options = {option for x in TYPER.commands[command].params for option in x.opts}  # type: ignore[attr-defined]
    assert new.split()[0] in options
    assert old not in options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres"], "Did you mean 'compress'"),
        (["compress", "a", "b", "--kep", "1"], "--keep"),
        (["compress", "a"], "Missing argument"),
    ],
)
def test_mistypes_are_told_within_80_columns(arguments, message):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert max(map(len, result.stderr.splitlines())) <= 80


def test_version(mea):
    assert mea("--version").stdout == f"mea {importlib.import_module('mea').__version__}\n"


def test_a_log_gets_a_line_for_each_stage_and_again_while_it_lasts(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    with console.progress() as report:
        report("fitting (layer 1)", 0, 1000)
        report("fitting (layer 2)", 250, 1000)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fitting (layer 1): 0 of 1,000 (0%)"
    assert sum(line.startswith("fitting (layer 2): 250 of 1,000 (25%), about 0.0 min left") for line in lines) > 1


def test_a_log_gets_the_end_of_each_stage(capsys):
    with console.progress() as report:
        for stage in ("first", "second"):
            for done in range(3):
                report(stage, done, 2)
    ends = ["first: 0 of 2 (0%)", "first: 2 of 2 (100%)", "second: 0 of 2 (0%)", "second: 2 of 2 (100%)"]
    assert capsys.readouterr().err.splitlines() == ends


PROGRAM = """
import contextlib, io, json, sys
arguments = json.loads(sys.argv[1])
import mea
if arguments is not None:
    from mea.cli import app
    sys.argv = ["mea", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


MISTAKES = [
    ["compress", "./absent", "out"],
    ["compress", "gpt2", "out", "--method", "sdv"],
    ["compress", "gpt2", "out", "--calibration-text", "absent.txt"],
    ["compress", "gpt2", "/", "--keep", "0.2"],
    ["compress", "gpt2", "out", "--keep", "20"],
    ["compress", "gpt2", "out", "--budget", "64k tokens 1 GiB"],
    ["compress", "gpt2", "out", "--budget", "64k tokens in 1 GiB", "--keep", "0.2"],
    ["perplexity", "gpt2", "--text", "absent.txt"],
    ["generate", "gpt2", "prompt", "--against", "./absent"],
    ["recover", "gpt2", "out", "--text", "absent.txt"],
    ["eval", "./absent", "--suite", "zero-shot"],
]


@pytest.mark.parametrize(
    "arguments", [None, ["--help"], *([command, "--help"] for command in FUNCTIONS), *MISTAKES], ids=str
)
def test_nothing_heavy_is_imported_for(arguments):
    """Seconds depend on the machine; what takes them is the import of these packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    imported = set(run.stdout.split())
    assert "mea" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("module", ["mea.report", "mea.scaling", "mea.records"])
def test_reports_and_fits_need_no_torch(module):
    program = f"import sys, {module}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
