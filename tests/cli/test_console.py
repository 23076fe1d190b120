import pytest
import typer

from mea.cli.console import friendly


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
