"""The profile's section and table say what the record says."""

import io

from rich.console import Console

from mea.records import make_record
from mea.report import make_sections
from mea.report.sections.profile import profile_table


def record(layers: int = 6, done: int = 6):
    found = [
        {"added": 0.1 / (1 + place), "standard_error": 0.01, "relative_output_error": 0.02} for place in range(done)
    ]
    layouts = {"full": list(range(layers)), "half": [1, 2, 3], "deep": [3, 4, 5]}
    config = {"model": "m", "method": "post_rope", "keep": 0.5, "layers": layers, "layouts": layouts}
    config |= {"text": "rest", "tokens": 4096, "window": 1024}
    return make_record("profile", config, results={"loss": 3.0, "layers": found})


def test_sums_over_layouts():
    (section,) = make_sections([record()])
    figure, sums = section.parts
    assert figure.figures[0].svg.startswith("<svg")
    assert sums.table is not None
    expected = [0.1 * sum(1 / (1 + place) for place in places) for places in (range(6), (1, 2, 3), (3, 4, 5))]
    assert sums.table.lines[0][1:4] == [f"{value:.3f}" for value in expected]
    assert sums.table.lines[0][4] == "5, 4, 3, 2, 1"


def test_a_run_that_is_not_finished_says_so():
    (section,) = make_sections([record(done=4)])
    assert "4 of 6 layers" in section.parts[1].table.note


def test_the_terminal_shows_the_cheapest_layer_first():
    console = Console(file=io.StringIO(), width=120)
    console.print(profile_table(record()))
    rows = [line.split() for line in console.file.getvalue().splitlines() if line.strip()[:1].isdigit()]
    assert rows[0][:2] == ["5", "0.0167"]
