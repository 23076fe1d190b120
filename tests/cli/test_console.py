"""What a message says is printed as it is: brackets are no markup, and escape sequences do not reach a terminal."""

import pytest
import typer

from mea.cli import console
from mea.cli.console import friendly


@pytest.mark.parametrize("name", ["[/x]", "[red]a[/red]", "shape [2, 3]"])
def test_brackets_in_messages_stay(capsys, name):
    def fail():
        console.errors.print(f"note {name}")
        raise ValueError(f"no {name}")

    with pytest.raises(typer.Exit):
        friendly(fail)()
    assert capsys.readouterr().err == f"note {name}\nerror: no {name}\n"


def test_escape_sequences_are_left_out(capsys):
    def fail():
        raise ValueError("no \x1b[31mfile\x07")

    with pytest.raises(typer.Exit):
        friendly(fail)()
    assert capsys.readouterr().err == "error: no [31mfile\n"


@pytest.mark.parametrize(
    ("said", "printed"),
    [((), "the same command continues from what was finished"), (("nothing was kept",), "nothing was kept")],
)
def test_an_interruption_says_what_is_kept(said, printed, capsys):
    @friendly
    def command():
        raise KeyboardInterrupt(*said)

    with pytest.raises(typer.Exit) as stop:
        command()
    assert stop.value.exit_code == 130
    assert capsys.readouterr().err == f"interrupted; {printed}\n"


def test_a_command_without_state_starts_again(capsys):
    @friendly
    def perplexity():
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit):
        perplexity()
    assert capsys.readouterr().err == "interrupted; the same command starts again\n"
