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
