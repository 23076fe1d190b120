"""The examples of README.md and docs/ work: Python runs, on a tiny model, and command lines parse."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from compression.small import tiny
from mea.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"attention.md": "tests/models/test_guide.py", "adding_a_method.md": "tests/compression/methods"}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def command_lines(text: str) -> list[str]:
    """Of code blocks, fenced or indented."""
    blocks = "\n".join(block for language, block in FENCE.findall(text) if language != "python")
    indented = re.findall(r"^    (.*)", FENCE.sub("", text), re.M)
    lines = [*re.sub(r"\\\n *", "", blocks).splitlines(), *indented]
    return [line[line.index("mea ") :] for line in lines if re.match(r"(mea|torchrun .* mea) ", line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_command_lines_parse(document: Path):
    text = document.read_text(encoding="utf-8")
    for line in command_lines(text):
        _, name, *arguments = shlex.split(re.sub(r"\[.*\.\.\.\]|[\[\]]", "", line), comments=True)
        if not {"...", "--help"} & {name, *arguments}:
            COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_named_in_the_text_exist(document: Path):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for line in re.findall(r"`mea\s+([^`]*)`", text):
        name, *words = line.split()
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}, line


def test_python_runs(tokenizer, tmp_path, monkeypatch):
    """In one folder, README.md first: it saves the compressed model that the guides load."""
    model = tmp_path / "original"
    tiny(max_position_embeddings=8192, num_hidden_layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("small")
    for document in DOCUMENTS:
        names: dict[str, Any] = {}
        for language, block in FENCE.findall(document.read_text(encoding="utf-8")):
            if language == "python" and document.name not in ELSEWHERE:
                exec(compile(block.replace(MODEL, str(model)), document.name, "exec"), names)


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100
